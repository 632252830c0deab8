"""This suite's additions to pytest: longer limits by mark, a line that counts what was skipped."""

from collections import Counter

import pytest

# Seconds that a test may take, where that is more than the limit of the others.
LONGER = {"slow": 1200, "long": 1800, "launchers": 1800, "faults": 3600}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        limits = [LONGER[mark.name] for mark in item.iter_markers() if mark.name in LONGER]
        if limits and item.get_closest_marker("timeout") is None:
            typed = item.config.getoption("timeout") or 0
            item.add_marker(pytest.mark.timeout(max(*limits, typed)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    # Of a skipped test this is the file, the line and the reason.
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    counted = [f"{count} {reason}" for reason, count in reasons.most_common()]
    terminalreporter.write_line(f"skipped: {'; '.join(counted) or 'none'}")
