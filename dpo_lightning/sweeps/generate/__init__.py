"""The command ``generate``: answers of trained policies to a file of prompts, as files."""
