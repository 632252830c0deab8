"""The page of a run, ``report.html``, and what pages share: head, style, script, colours, numbers.

In: the files of a run's folder. Out: one page that needs nothing but itself. Imports no torch and
no matplotlib: each trial of a sweep writes one at its end.
"""
