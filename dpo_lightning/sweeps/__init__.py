"""Sweeps: every trial a process of its own on leased devices, watched, judged and reported.

In: the overrides of each trial, a launcher's settings. Out: a folder for each, and the report.
"""
