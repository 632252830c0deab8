"""Memory that a run takes of a device, before and while it runs.

In: a model's shape, the settings, the device. Out: an estimate, a budget of tokens, and what to
turn where they are not enough.
"""
