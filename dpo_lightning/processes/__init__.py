"""Communication of processes: signals, the other ranks of a run, lifelines, process groups.

In: process ids, signals, exit codes. Out: who is told, who is ended, and with which code.
"""
