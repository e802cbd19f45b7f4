"""Pure planning: no torch, no file opened, no clock."""
