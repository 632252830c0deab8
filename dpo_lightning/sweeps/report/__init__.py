"""The report of a sweep: ``python -m dpo_lightning.sweeps.report FOLDER`` writes it at any time.

In: the folders of trials, in whatever state. Out: ``report.html``, ``report.md``, ``frontier.png``
and ``sweep.json``.
"""
