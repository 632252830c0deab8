"""The commands and the code of the README and of docs/: each block is run as it stands.

The blocks of a page run one after the other in a folder in which there is what a reader has there
(``tests/support/page_kit.py``, where also stands what is made smaller). A block that cannot run on
a machine without a GPU, a cluster or an account has a marker above it that says why. The tutorial,
the Python page and the notebook are run at their full length by tests of their own.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_blocks import Block, blocks, stray_markers
from tests.support.page_kit import SMALLER, lay_out, make_models, smaller
from tests.support.runs import ROOT
from tests.support.terminal import Terminal

GENERATED = ("docs/api.md", "docs/outcomes.md", "docs/settings.md")
"""Pages that are made from the code; none has a command."""

NOT_RUN = {
    "README.md": 2,  # installing, twice
    "docs/answers.md": 1,  # vLLM, and a server of completions
    "docs/coming_from/alignment_handbook.md": 2,  # eight GPUs
    "docs/coming_from/original.md": 1,  # four GPUs
    "docs/coming_from/trl.md": 1,  # four GPUs
    "docs/gpus.md": 1,  # eight GPUs
    "docs/judges.md": 2,  # a judge's server
    "docs/loggers.md": 1,  # mlflow
    "docs/running.md": 1,  # eight GPUs
    "docs/scaling.md": 1,  # 42 trials of a real model
    "docs/sharing.md": 1,  # the hub
    "docs/slurm_and_ray.md": 2,  # SLURM, Ray
}
"""Markers of each page. One more is a decision, to be taken here."""

ALL_NOT_RUN = 16

_LORA = "dpo-lightning train model=qwen3-0.6b data.train=pairs.jsonl peft=lora"
_JUDGED = "plugins=[my_scorers] evaluation.judge=my_scorers.brevity"
_MINE = f"{_LORA} hydra.run.dir=outputs/runs/mine"
_DATED = "outputs/runs/2026-01-01_00-00-00_mine"

BEFORE = {
    "docs/answers.md": f"""
        {_MINE}
        {_LORA} -m beta=0.1,0.3 hydra.sweep.dir=outputs/sweeps/mine
        mkdir answers
        printf 'name,win_rate\\nbeta-0.1,40.5\\nbeta-0.3,50.5\\n' > answers/leaderboard.csv
    """,
    "docs/judges.md": f"""
        {_LORA} {_JUDGED} hydra.run.dir={_DATED}
        dpo-lightning generate {_DATED} prompts.jsonl --output answers.jsonl
    """,
    "docs/rounds.md": f"{_MINE} {_JUDGED} rounds.count=3",
    "docs/running.md": f"""
        {_LORA} hydra.run.dir={_DATED}
        {_LORA} beta=0.1 hydra.run.dir=outputs/runs/one
        {_LORA} beta=0.3 hydra.run.dir=outputs/runs/other
        {_MINE} trainer.max_epochs=1
        dpo-lightning train -m beta=0.1,0.3 hydra.sweep.dir=outputs/sweeps/2026-01-01_00-00-00
    """,
    "docs/sharing.md": f"{_LORA} hydra.run.dir={_DATED}",
}
"""What a page takes to have been done, as it may name a run of yours."""

ASSUMED = {
    "docs/objectives.md": """
import torch

beta = 0.1
pc, pr, rc, rr = torch.tensor([[-4.0], [-9.0], [-5.0], [-8.0]])
nc, nr = torch.tensor([3]), torch.tensor([4])
p, r, z0 = torch.tensor([-5.0, -9.0]), torch.tensor([-6.0, -7.0]), 1.0
thumbs_up = torch.tensor([True, False])
s, group, rank = torch.zeros(5), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2])
""",
}
"""Names that the Python of a page takes to be there."""

PYTHON_ELSEWHERE = ("docs/python.md",)
"""Pages whose Python a test of their own runs, in the order of the page."""


def pages() -> list[str]:
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in ("README.md", *found) if page not in GENERATED]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def run_block(terminal: Terminal, page: str, block: Block, folder: Path) -> None:
    """Types a block of commands, or runs one of Python that is no file."""
    if block.kind == "sh":
        terminal.type(block.body, folder)
    elif block.kind == "python" and not block.file and page not in PYTHON_ELSEWHERE:
        (folder / "block.py").write_text(ASSUMED.get(page, "") + block.body)
        terminal.type("python block.py", folder)


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    opened = Terminal(smaller)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


# Long as all of them take many minutes.
@pytest.mark.docs
@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in pages() if blocks(text_of(page))])
def test_the_blocks_of_a_page_run_in_their_order(page, terminal, models, tmp_path):
    lay_out(tmp_path, models)
    terminal.type(BEFORE.get(page, ""), tmp_path)
    found = blocks(text_of(page))
    for block in found:
        if block.file:
            (tmp_path / block.file).write_text(block.body)
    for block in found:
        if block.why is None:
            run_block(terminal, page, block, tmp_path)


@pytest.mark.docs
@pytest.mark.long
def test_a_line_that_fails_is_shown_with_what_it_said(terminal, tmp_path):
    with pytest.raises(AssertionError, match=r"exit code 2\nerror: bta: unknown key"):
        terminal.type("dpo-lightning train bta=1 | cat\necho not reached", tmp_path)
    said = terminal.type(
        "echo words | python -c 'print(input())'\npython train.py --cfg job", tmp_path
    )
    assert said.startswith("words\n")
    for key, value in SMALLER.items():
        section, _, name = key.rpartition(".")
        assert not section or re.search(rf"^ *{name}: {value}$", said, flags=re.M), key


# What is counted ------------------------------------------------------------------------------


def test_what_is_not_run_is_counted():
    """A block that is kept from being run says why, and there are no more of them than these."""
    found = {page: blocks(text_of(page)) for page in pages()}
    marked = {page: sum(own.why is not None for own in all_own) for page, all_own in found.items()}
    assert {page: count for page, count in marked.items() if count} == NOT_RUN
    assert sum(NOT_RUN.values()) == ALL_NOT_RUN
    assert [page for page in pages() if stray_markers(text_of(page))] == []
    for page, all_own in found.items():
        for own in all_own:
            place = f"{page}:{own.line}"
            assert own.why is None or (own.kind in ("sh", "python") and own.why.strip()), place
            # Of these kinds alone something is run; others are output, rows and settings.
            assert own.kind in ("sh", "python", "json", "yaml", "text", ""), place


def test_most_commands_are_run():
    """A page could else be emptied of what is run, and nobody would see it."""
    lines = {True: 0, False: 0}
    for page in pages():
        for own in blocks(text_of(page)):
            if own.kind == "sh":
                lines[own.why is None] += len(re.sub(r"\\\n", "", own.body).splitlines())
    assert lines[True] >= 130
    assert lines[False] <= 40


def test_names_of_pages_are_those_of_pages():
    assert {*NOT_RUN, *BEFORE, *ASSUMED, *PYTHON_ELSEWHERE} <= {*pages()}
    assert [
        page for page in GENERATED if any(own.kind == "sh" for own in blocks(text_of(page)))
    ] == []


def test_blocks_are_read_in_order_out_of_lists_and_with_their_markers():
    text = (
        "a\n```sh\nb\n```\n\n<!-- not run: needs c -->\n```python\n# d.py, here\ne\n```\n"
        "- f:\n\n  <!-- not run: g -->\n  ```sh\n  h\n    i\n  ```\n"
        "<!-- not run: j -->\n\n```\nk\n```\n"
    )
    assert blocks(text) == [
        Block("sh", "b\n", None, 3),
        Block("python", "# d.py, here\ne\n", "needs c", 8),
        Block("sh", "h\n  i\n", "g", 15),
        Block("", "k\n", None, 21),
    ]
    assert [block.file for block in blocks(text)] == [None, "d.py", None, None]
    assert stray_markers(text) == 1


def test_a_training_is_made_smaller_and_nothing_else():
    added = [f"{key}={value}" for key, value in SMALLER.items()]
    assert smaller(["train", "beta=0.1"]) == ["train", "beta=0.1", *added]
    of_rows = [word for word in added if "controlled" not in word]
    for own in ("data.train=x", "data=hh", "experiment=preferences"):
        assert smaller(["train", own]) == ["train", own, *of_rows]
    assert "trainer.max_steps=16" not in smaller(["train", "resume=x"])
    assert "trainer.max_steps=16" not in smaller(["train", "trainer.max_steps=3"])
    assert smaller(["train", "rounds.count=64", "rounds.steps=8"]) == [
        *("train", "rounds.count=2", "rounds.steps=8"),
        *(word for word in added if word != "trainer.max_steps=16"),
    ]
    assert "evaluation.every_n_steps=8" in smaller(["train", "checkpoint.monitor=eval/loss"])
    assert "logger=none" not in smaller(["train", "logger=wandb"])
    assert smaller(["evaluate", "x"]) == ["evaluate", "x"]
