"""Bytes on disk: headers, indexes, readers, writers, sidecars. No arithmetic."""
