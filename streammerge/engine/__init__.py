"""Run a plan: stages, staging folder, the export from beginning to end."""
