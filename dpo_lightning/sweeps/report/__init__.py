"""The report of a sweep: ``dpo-lightning report FOLDER`` writes it at any time.

In: the folders of trials, in whatever state. Out: ``report.html``, ``report.md``, ``frontier.png``
and ``sweep.json``.
"""
