"""The command ``inspect``: rows, lengths, plan, memory and time of a run that is not started."""
