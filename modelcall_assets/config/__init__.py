"""Task, model and prompt files, checked before anything runs."""
