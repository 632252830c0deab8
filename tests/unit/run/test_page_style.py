"""Style that all pages share: colours to read, cells that say what they are, room for labels."""

import re

import pytest

from dpo_lightning.run.page.colours import COMMON, PAPER, SOFT, TEXT
from dpo_lightning.run.page.environment import page_environment
from dpo_lightning.run.page.plots import WIDTH, Curve, panel
from tests.support.page_faults import LEAST_CONTRAST
from tests.support.runs import ROOT

PACKAGE = ROOT / "dpo_lightning"
GROUNDS = ("paper", "card", "picked")
WORDS = ("text", "soft", "accent", "link", "bad")


def schemes(template: str) -> dict[str, dict[str, str]]:
    """Colours of a template by name, of the light and of the dark scheme."""
    text = (PACKAGE / template).read_text()
    found = re.findall(r":root \{(.*?)\}", text)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in found[:2])
    return {"light": light, "dark": dark}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag():
    """Black on white 1.05 / 0.05 = 21; #767676 has 0.1812, and 1.05 / 0.2312 is 4.54."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_every_ground(scheme: str):
    own = schemes("run/page/templates/style.css")[scheme]
    rows = own | schemes("run/inspect/templates/page.html")[scheme]
    pairs = [(own[word], own[ground]) for word in WORDS for ground in GROUNDS]
    pairs += [(rows["text"], rows[ground]) for ground in ("even", "odd", "special")]
    pairs += [(rows["warn"], rows["paper"])]
    dark = scheme == "dark"
    text, soft, paper = (COMMON[c][1] if dark else c for c in (TEXT, SOFT, PAPER))
    pairs += [(text, paper), (soft, paper)]
    pale = [(a, b, contrast(a, b)) for a, b in pairs if contrast(a, b) < LEAST_CONTRAST]
    assert pale == []


def test_a_card_says_what_each_cell_is_and_two_columns_stay_a_table():
    macros = page_environment().get_template("macros.html").module
    cards = macros.text_table(["β", "a < b", "c"], [["1", "<i>", "3"]], left=[1], sortable=True)
    assert '<table class="cards sortable">' in cards
    assert re.findall(r'<td( class="left")? data-head="([^"]*)">([^<]*)</td>', cards) == [
        ("", "β", "1"),
        (' class="left"', "a &lt; b", "&lt;i&gt;"),
        ("", "c", "3"),
    ]
    assert '<table class="pairs">' in macros.text_table(["name", "value"], [["a", "b"]])


def test_answers_stand_beside_who_gave_them_and_one_is_marked():
    macros = page_environment().get_template("macros.html").module
    shown = macros.answer_cards("<q>", ["a", "b"], iter(["x", "y"]), marked=1, mark=" (best)")
    assert "<h3>&lt;q&gt;</h3>" in shown
    assert re.findall(r"<div(.*?)><dt>(.*?)</dt><dd>(.*?)</dd></div>", shown) == [
        ("", "a", "x"),
        (' class="picked"', "b (best)", "y"),
    ]


def test_no_table_of_a_template_is_left_to_itself_on_a_phone():
    """Each is of cards, whose cells name their head, or of pairs."""
    for path in PACKAGE.rglob("templates/*.html"):
        text = path.read_text()
        tables = re.findall(r"<table[^\n]*", text)
        assert all("cards" in table for table in tables), path
        cells = re.findall(r"<td\b[^\n]*?>", re.sub(r"\{[%{].*?[%}]\}", "", text))
        assert all("data-head=" in cell for cell in cells), path


@pytest.mark.parametrize("steps", [10_000, 100_000, 400_000])
def test_the_number_of_the_last_step_is_not_cut_off(steps: int):
    """A digit of 12 pixels is at most 7.7 wide; half of the number reaches beyond its tick."""
    svg = panel("loss", [Curve("training", [(0, 1.0), (steps, 0.5)])])
    assert svg is not None
    ticks = re.findall(r'<text x="([\d.]+)" y="211.0"[^>]*text-anchor: middle">([^<]*)<', svg)
    assert len(ticks) > 2
    place, number = ticks[-1]
    assert float(number.replace(",", "")) == steps
    assert float(place) + len(number) * 7.7 / 2 <= WIDTH
