"""Asks the advisory service of PyPI about every pin of constraints.txt; `make audit` runs it.

A known vulnerability is exit code 1. A service that cannot be reached, or that knows none of the
pins, as behind a mirror, is said in one line and is no failure: pip-audit itself would report
"No known vulnerabilities found" of the latter.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
SECONDS = 300


def judge(report: str) -> tuple[list[str], int]:
    """What to print about a report of pip-audit in JSON, and the exit code."""
    try:
        dependencies: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return ["audit: the advisory service was not reached, so nothing was audited"], 0
    found = [d for d in dependencies if d.get("vulns")]
    skipped = [d["name"] for d in dependencies if "vulns" not in d]
    lines = [
        f"audit: {d['name']}=={d['version']}: {v['id']}, fixed in "
        f"{', '.join(v['fix_versions']) or 'no version yet'}"
        for d in found
        for v in d["vulns"]
    ]
    audited = len(dependencies) - len(skipped)
    if not audited:
        lines.append(f"audit: the advisory service knows none of {len(skipped)} pins: not audited")
    else:
        verdict = f"{len(found)} with known vulnerabilities" if found else "none with a known one"
        lines.append(f"audit: {audited} of {len(dependencies)} pins audited, {verdict}")
        lines += [f"audit: not audited: {', '.join(skipped)}"] if skipped else []
    return lines, 1 if found else 0


def main(arguments: Sequence[str]) -> int:
    """Audits the pins; ``arguments`` are passed on, such as ``--ignore-vuln ID``."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps"]
    options = ["--disable-pip", "--format=json", "--progress-spinner=off", "--timeout=5"]
    try:
        done = subprocess.run(
            [*command, *options, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        report = ""
    else:
        report = done.stdout
    lines, code = judge(report)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
