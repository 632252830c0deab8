"""One experiment, in the order of time: supervise, prepare, plan, place, build, conclude.

In: checked settings and a folder. Out: that folder with ``result.json``, checkpoints and the
export, whatever the outcome.
"""
