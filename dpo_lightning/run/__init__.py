"""One experiment, in the order of time: supervise, prepare, session, build, conclude.

In: checked settings and a folder. Out: that folder with ``result.json``, checkpoints and the
export, whatever the outcome.
"""
