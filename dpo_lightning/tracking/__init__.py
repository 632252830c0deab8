"""Output of a run while it works: metrics, progress, tables, lines of the log, wandb.

In: numbers of steps and evaluations, lines. Out: ``metrics.jsonl``, a run in wandb, what a terminal
shows.
"""
