"""The day that chat templates are told. Imports nothing heavy."""

from datetime import date

DEFAULT_DATE = "2026-01-01"
"""The same on all days and machines, where nothing is said."""


def is_date(text: str) -> bool:
    """True for a day in the form YYYY-MM-DD.

    Example:
        >>> is_date("2026-01-31"), is_date("2026-02-31"), is_date("31.1.2026")
        (True, False, False)
    """
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
