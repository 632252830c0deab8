"""The command ``judge``: marks of answers that are there already, made here or elsewhere."""
