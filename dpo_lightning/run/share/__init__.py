"""Sharing a trained policy: a folder that others load, and a repository on the hub.

In: the folder of a run, or one that was exported. Out: a folder, a repository, what each holds.
"""
