"""Checks of a machine before anything is trained on it: the command ``doctor``.

In: nothing but the machine. Out: one line a check, and whether a run can be expected to be right.
"""
