"""The command ``compare``: trained policies on the same held-out rows, tested row by row."""
