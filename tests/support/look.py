"""Looks at pages as readers see them: on a phone and on a desk, in light and in dark.

``python -m tests.support.look FOLDER PAGE…`` writes four pictures of each page into a folder, and
prints its faults. A page is a file or an address.
"""

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.browser import Browser, open_browser
from tests.support.page_faults import faults_of

WIDTHS = (390, 1280)
"""Of a phone and of a desk, in CSS pixels."""


def views(browser: Browser, page: Path | str) -> Iterator[str]:
    """Opens a page in each of its views, one after the other.

    Args:
        browser: A browser.
        page: A file or an address.

    Yields:
        The view's name, while the browser shows it.
    """
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(page, width=width, dark=dark)
            yield f"{width}-{'dark' if dark else 'light'}"


def main(argv: Sequence[str]) -> int:
    """Writes the pictures and prints the faults.

    Args:
        argv: The folder, and the pages.

    Returns:
        1 if a page has a fault, else 0.
    """
    folder, *pages = argv
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = 0
    with tempfile.TemporaryDirectory() as user, open_browser(Path(user)) as browser:
        for page in pages:
            name = re.sub(r"\W+", "-", page).strip("-")[-80:]
            for view in views(browser, page if "://" in page else Path(page)):
                faults = faults_of(browser)
                browser.picture(Path(folder) / f"{name}-{view}.png")
                print("".join(f"{page} {view}: {fault}\n" for fault in faults), end="")
                found += len(faults)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
