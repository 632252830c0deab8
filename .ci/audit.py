"""Asks the advisory service of PyPI about every pin of constraints.txt; `make audit` runs it.

The exit code is 0 where pins were audited and none has a known vulnerability, 1 where one has, and
3 where nothing was audited: the service was not reached, or knows none of the pins, as behind a
mirror. pip-audit itself would report "No known vulnerabilities found" of the latter. Then the last
line that is printed begins with ``NOT AUDITED``.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
SECONDS = 300
FOUND, NOT_AUDITED = 1, 3


def judge(report: str, said: str = "") -> tuple[list[str], int]:
    """What to print about a report of pip-audit in JSON, and the exit code.

    Args:
        report: The report; anything but one is no answer.
        said: What pip-audit wrote beside it, the reason last.
    """
    try:
        dependencies: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reasons = [line.strip() for line in said.splitlines() if line.strip()]
        reason = f" ({reasons[-1]})" if reasons else ""
        return [f"NOT AUDITED: the advisory service was not reached{reason}"], NOT_AUDITED
    found = [d for d in dependencies if d.get("vulns")]
    skipped = [d["name"] for d in dependencies if "vulns" not in d]
    audited = len(dependencies) - len(skipped)
    if not audited:
        return [f"NOT AUDITED: the advisory service knows none of {len(skipped)} pins"], NOT_AUDITED
    lines = [f"audit: not audited: {', '.join(skipped)}"] if skipped else []
    lines += [
        f"audit: {d['name']}=={d['version']}: {v['id']}, fixed in "
        f"{', '.join(v['fix_versions']) or 'no version yet'}"
        for d in found
        for v in d["vulns"]
    ]
    verdict = f"{len(found)} with known vulnerabilities" if found else "none with a known one"
    lines.append(f"audit: {audited} of {len(dependencies)} pins audited, {verdict}")
    return lines, FOUND if found else 0


def main(arguments: Sequence[str]) -> int:
    """Audits the pins; ``arguments`` are passed on, such as ``--ignore-vuln ID``."""
    if find_spec("pip_audit") is None:
        print("audit: pip-audit is not installed: run make audit", file=sys.stderr)
        return FOUND
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps"]
    options = ["--disable-pip", "--format=json", "--progress-spinner=off", "--timeout=5"]
    try:
        done = subprocess.run(
            [*command, *options, *arguments], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        report, said = "", f"no answer within {SECONDS} s"
    else:
        report, said = done.stdout, done.stderr
    lines, code = judge(report, said)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
