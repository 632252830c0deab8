"""Every kind of page in a browser: on a phone and on a desk, in light and in dark.

``python -m tests.support.look FOLDER PAGE…`` shows what is measured here.
"""

import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpo_lightning.run.inspect.command import main
from tests.support.browser import Browser, open_browser
from tests.support.look import WIDTHS, views
from tests.support.page_faults import faults_of
from tests.support.runs import ROOT
from tests.support.shown_pages import write_comparison, write_run, write_sweep, write_wide_sweep

# The browser takes seconds to start.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("user")) as opened:
        yield opened


def faults_of_views(browser: Browser, page: Path | str, **options: str) -> dict[str, list[str]]:
    """Faults of a page by the view that has them."""
    found = {view: faults_of(browser, **options) for view in views(browser, page)}
    return {view: faults for view, faults in found.items() if faults}


# The measure ------------------------------------------------------------------------------------

SOUND = "<body style='background:#fff;color:#000'><p>words</p>"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("", None),
        ("<p style='width:400px'>wide</p>", 'beyond the window: p "wide"'),
        ("<p style='width:1000vw'>wide</p>", "the page is 3908 wide and its window 390"),
        ("<p style='overflow:hidden;width:9px;white-space:nowrap'>more words</p>", "wider than"),
        ("<p style='overflow:auto;width:9px;white-space:nowrap'>more words</p>", "wider than"),
        ("<p style='overflow:hidden;height:9px'>tall</p>", 'taller than its box: p "tall"'),
        # (255 + 12.75) / (L + 12.75): #777 has a luminance of 0.1845, and 1.05 / 0.2345 is 4.48.
        ("<p style='color:#777'>pale</p>", 'contrast 4.48: p "pale"'),
        # #767676: 0.1812, and 1.05 / 0.2312 is 4.54.
        ("<p style='color:#767676'>pale enough</p>", None),
        ("<p style='opacity:.4'>faint</p>", "contrast"),
        ("<p style='background:#000'><i style='color:#000;background:#fff3'>x</i></p>", "contrast"),
        ("<details><summary>s</summary><p style='color:#eee'>in it</p></details>", "contrast"),
        ("<img src='data:,'>", "no alt"),
        ("<img src='data:,' alt=''>", None),
        ("<a href='#'><img src='data:,' width='9' height='9'></a>", "no name: a"),
        ("<a id='line-1'></a>", None),
        ("<table><tr><td style='display:flex'>1</td></tr></table>", "a line without its head"),
        ("<svg role='img' width='90' height='30'><text y='20'>x</text></svg>", "no label: svg"),
        (
            "<svg aria-label='s' width='90' height='30'><text x='80' y='20'>words</text></svg>",
            "cut off: label words of s",
        ),
        (
            "<svg aria-label='s' width='90' height='30'><text y='20'>one</text>"
            "<text x='9' y='20'>two</text></svg>",
            "overlaps two: label one of s",
        ),
        ("<svg width='90' height='30'><text y='20' fill='#ddd'>x</text></svg>", "contrast 1.3"),
        ("<script>console.error('oh')</script>", "console: "),
        ("<script>undefined.x</script>", "console: "),
    ],
)
def test_each_fault_is_seen(browser: Browser, tmp_path: Path, body: str, fault: str | None):
    """Contrast is (L + 0.05) / (l + 0.05) of the two relative luminances."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{SOUND}{body}")
    browser.open(page, width=WIDTHS[0], dark=False)
    found = faults_of(browser)
    assert bool(found) == (fault is not None), found
    assert fault is None or any(fault in one for one in found), found


def test_a_box_that_may_be_scrolled_is_no_fault(browser: Browser, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(f"{SOUND}<pre style='overflow:auto;width:99px'>{'x' * 99}</pre>")
    browser.open(page, width=WIDTHS[0], dark=False)
    assert faults_of(browser, scrollers="pre") == []


# The pages --------------------------------------------------------------------------------------


def test_the_page_of_a_run(browser: Browser, tmp_path: Path):
    assert faults_of_views(browser, write_run(tmp_path)) == {}


def test_the_report_of_a_sweep(browser: Browser, tmp_path: Path):
    write_sweep(tmp_path / "sweep")
    assert faults_of_views(browser, tmp_path / "sweep" / "report.html") == {}


def test_a_report_with_all_that_one_may_have(browser: Browser, tmp_path: Path):
    write_wide_sweep(tmp_path / "sweep")
    page = tmp_path / "sweep" / "report.html"
    assert faults_of_views(browser, page) == {}
    shown = browser.run("document.body.innerText")
    for part in ("Objectives", "Marks of leaderboard.csv", "The frontier of one policy", "Signs"):
        assert part in shown


def test_the_page_of_a_comparison(browser: Browser, tmp_path: Path):
    assert faults_of_views(browser, write_comparison(tmp_path / "page.html")) == {}


def test_the_page_of_rows(browser: Browser, tmp_path: Path, monkeypatch, tiny_model: Path):
    monkeypatch.chdir(tmp_path)
    long = {"prompt": "w" * 60, "chosen": "<b>bold</b>" + "v" * 40, "rejected": "u\x1b[2J"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(long) + "\n")
    words = [f"model.pretrained={tiny_model}", "data.train=rows.jsonl", "data.eval_fraction=0"]
    assert main([*words, "--html", "rows.html"]) == 0
    assert faults_of_views(browser, tmp_path / "rows.html") == {}
    assert "<b>bold</b>" in browser.run("document.body.innerText").replace("\n", "")


# What the pages do ------------------------------------------------------------------------------

PLOT = 'getComputedStyle([...document.querySelectorAll(".figure svg")].find(s => s.clientWidth))'
ROWS = '[...document.querySelectorAll("table.sortable")[0].tBodies[0].rows]'
COLUMN = ROWS + '.map((row) => row.cells[1].innerText.split("\\n")[0])'


def test_schemes_widths_and_sorting_of_a_report(browser: Browser, tmp_path: Path):
    pick = write_sweep(tmp_path / "sweep")["pick"]["label"]
    papers, inks, narrow = [], [], []
    for _ in views(browser, tmp_path / "sweep" / "report.html"):
        papers.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        inks.append(browser.run(f'{PLOT}.getPropertyValue("--figure-text")'))
        narrow.append(browser.run('document.querySelector(".phone").clientWidth > 0'))
    assert papers == ["rgb(255, 255, 255)", "rgb(17, 24, 39)"] * 2
    assert inks == ["#1f2937", "#e5e7eb"] * 2
    assert narrow == [True, True, False, False]
    assert browser.run(COLUMN)[0] == pick
    for order in (["β 0.05", "β 0.1", "β 1.0"], ["β 1.0", "β 0.1", "β 0.05"]):
        browser.run('document.querySelectorAll("table.sortable th")[1].firstChild.click()')
        assert browser.run(COLUMN) == order
    assert browser.said == []


# The site ---------------------------------------------------------------------------------------


def zensical() -> str | None:
    """The generator of the site: that of ``make docs``, or another one that can be found."""
    own = ROOT / ".venv-docs" / "bin" / "zensical"
    return str(own) if own.is_file() else shutil.which("zensical")


class Quiet(SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The built site and its address on this machine."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    command = [zensical() or "", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    handler = functools.partial(Quiet, directory=str(folder / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.long  # thirty pages in four views
@pytest.mark.skipif(zensical() is None, reason="no zensical (make docs)")
def test_each_page_of_the_site(browser: Browser, site: tuple[Path, str]):
    """Code and tables are scrolled sideways in boxes of their own; nothing else is."""
    folder, address = site
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    parts = {"within": ".md-content, .md-footer", "scrollers": "pre, .md-typeset__scrollwrap"}
    found = {}
    for page in pages:
        for view in views(browser, f"{address}/{page}"):
            found[page, view] = faults_of(browser, **parts)
            shown = browser.run("document.body.dataset.mdColorScheme")
            if shown != ("slate" if view.endswith("dark") else "default"):
                found[page, view].append(f"scheme {shown}")
    assert {where: faults for where, faults in found.items() if faults} == {}
