"""A group token by token, and texts of anybody in a terminal and on a page."""

import io
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dpo_lightning.errors import UserError
from dpo_lightning.run.inspect.content import Bar, Bars, Fact, Passage, Section, TokenText
from dpo_lightning.run.inspect.example import MOST_TOKENS, example_of, pieces
from dpo_lightning.run.inspect.page import check_page, write_page
from dpo_lightning.run.inspect.terminal import show
from dpo_lightning.run.inspect.visible import visible
from tests.support.properties import examples
from tests.support.tokens import BEGIN, END, make_group, make_tokenizer, tokenize


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 漢", "plain ünï 漢"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("a\r\x7f\x9b2J", "a␍␡\\u009b2J"),
        ("a\u202eb\u2066c\u2028d", "a\\u202eb\\u2066c\\u2028d"),
        ("half \ud800", "half \\ud800"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("a\tb\u00a0c", "a␉b\u00a0c"),
    ],
)
def test_control_characters_become_signs(text, shown):
    assert visible(text) == shown


def test_ends_of_lines_stay_where_lines_are_kept():
    assert visible("a\n\nb", lines=True) == "a⏎\n⏎\nb"
    assert visible("a\nb") == "a⏎b"


@settings(max_examples=examples(80))
@given(st.text(st.characters()))
def test_nothing_that_moves_a_terminal_is_left(text):
    left = visible(text, lines=True).replace("\n", "").replace("\u200c", "").replace("\u200d", "")
    assert not {unicodedata.category(c) for c in left} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@settings(max_examples=examples(60))
@given(st.text("ab cxl é漢😀\n", max_size=20))
def test_texts_of_tokens_are_the_text_of_all(text):
    """A character of up to four bytes is up to four tokens, which come as one."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = list(pieces(ids, tokenizer))
    assert [i for own, _ in found for i in own] == ids
    assert "".join(shown for _, shown in found) == BEGIN + text
    assert not any("\ufffd" in shown for _, shown in found)


def test_a_group_names_its_scored_tokens_and_the_special_ones():
    """ "a" and " x" are two tokens behind BOS; the better response is "b" and EOS."""
    tokenizer = make_tokenizer()
    [group] = tokenize(make_group("a x", "b", "cc"), tokenizer=tokenizer).groups
    found = example_of(group, tokenizer, number=3)
    assert (found["number"], found["source"]) == (3, "rows.jsonl:1")
    texts = [token["text"] for token in found["prompt"]["tokens"]]
    assert texts == [BEGIN, "a", " x"]
    best, worst = found["responses"]
    assert [(t["text"], t["special"]) for t in best["tokens"]] == [("b", False), (END, True)]
    assert (best["rank"], worst["rank"], worst["length"]) == (1, 2, 3)


def test_of_long_texts_the_ends_that_meet_are_shown():
    tokenizer = make_tokenizer()
    long = make_group("y" * (MOST_TOKENS + 4) + "x", "x" + "y" * MOST_TOKENS, "z")
    [group] = tokenize(long, tokenizer=tokenizer, max_length=5000).groups
    found = example_of(group, tokenizer, number=1)
    prompt, best = found["prompt"], found["responses"][0]
    # BOS and the letters; the letters and EOS.
    assert (prompt["length"], prompt["left_out"]) == (MOST_TOKENS + 6, 6)
    assert prompt["tokens"][-1]["text"] == "x"
    assert (best["length"], best["left_out"]) == (MOST_TOKENS + 2, 2)
    assert best["tokens"][0]["text"] == "x"


HOSTILE = "<script>alert(1)</script><img src=x onerror=a>&quot;' \x1b[31m [bold]x[/bold]"
PARTS = [
    Section(
        "Rows",
        facts=(
            Fact("data.train", visible(HOSTILE)),
            Fact("long", "wordwordword " * 20, warns=True),
        ),
        histograms=(Bars("lengths", (Bar("0–9", "1,234,567", 1.0), Bar("10–19", "1", 1e-6))),),
        passages=(
            Passage("prompt", (TokenText("Hi ", "prompt"), TokenText("(… 3 tokens)", "note"))),
            Passage(
                "chosen",
                (
                    TokenText("Yes", "even"),
                    TokenText(visible(HOSTILE), "odd"),
                    TokenText("</s>", "special"),
                ),
            ),
        ),
    )
]


def printed(*, width: int, coloured: bool) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, highlight=False, force_terminal=coloured, no_color=False,
        color_system="standard" if coloured else None,
    )  # fmt: skip
    show(PARTS, console)
    return out.getvalue()


def test_a_pipe_gets_plain_text_whose_token_ends_are_seen():
    text = printed(width=200, coloured=False)
    assert "\x1b" not in text
    assert "[bold]x[/bold]" in text
    assert f"Yes|{visible(HOSTILE)}|⟦</s>⟧" in text
    assert "1,234,567" in text


def test_sixty_columns_are_enough():
    lines = printed(width=60, coloured=False).splitlines()
    assert max(map(len, lines)) <= 60
    joined = "".join("".join(lines).split())
    assert "".join(visible(HOSTILE).split()) in joined
    assert "wordwordword" * 20 in joined


def test_a_terminal_gets_colours_and_no_code_of_the_rows():
    text = printed(width=200, coloured=True)
    codes = set(re.findall(r"\x1b\[[0-9;]*m", text))
    assert codes
    assert text.count("\x1b") == len(re.findall(r"\x1b\[[0-9;]*m", text))
    assert "␛[31m" in text
    even = re.search(r"\x1b\[([0-9;]*)mYes", text).group(1)
    prompt = re.search(r"\x1b\[([0-9;]*)mHi", text).group(1)
    special = re.search(r"\x1b\[([0-9;]*)m</s>", text).group(1)
    assert len({even, prompt, special}) == 3


class Elements(HTMLParser):
    """Names and attributes of the elements of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data):
        self.text += data


def test_a_page_needs_nothing_and_takes_no_text_for_markup(tmp_path):
    path = tmp_path / "rows.html"
    write_page(path, PARTS, command=f"inspect {HOSTILE}")
    page = path.read_text()
    found = Elements(page)
    assert not {"script", "img"} & found.names
    assert not {name for name in found.attributes if name.startswith("on")}
    assert found.links == {"data:,"}
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "default-src 'none'" in page
    assert found.text.count("<script>alert(1)</script>") == 3
    assert "\x1b" not in page


def test_a_page_that_cannot_be_is_refused_ahead_of_all(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        check_page(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*; make it first"):
        check_page(tmp_path / "none" / "rows.html")
    check_page(tmp_path / "rows.html")
    assert list(tmp_path.iterdir()) == []
