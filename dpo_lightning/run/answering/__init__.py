"""Answers of trained policies to prompts of a user: what ``generate`` and ``chat`` share."""
