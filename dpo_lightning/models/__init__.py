"""Language models: loading, attention over groups, scoring."""
