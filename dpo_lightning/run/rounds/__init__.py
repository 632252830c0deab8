"""The rounds of a run: answers are drawn, marked, made into groups and trained on."""
