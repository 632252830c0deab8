"""The command ``judge``: answers of files and of a run's folder, and the one object it prints."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from dpo_lightning import plugins
from dpo_lightning.evaluation.win_rates import wilson
from dpo_lightning.run.judge.command import GRAMMAR, main
from dpo_lightning.run.words import read_words
from dpo_lightning.settings.compose import compose_one, ready_hydra
from tests.support.judge_server import Act, judge_server, marks_length, prefers_longer
from tests.support.runs import ROOT

LETTERS = """\
from dpo_lightning.plugins import register_scorer

@register_scorer("letters")
def letters(prompts, answers):
    return [len(answer) for answer in answers]
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a judge of one's own, which is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "SCORERS", {})
    monkeypatch.setattr("dpo_lightning.evaluation.named_judge.SCORERS", plugins.SCORERS)
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own_letters.py").write_text(LETTERS)
    yield tmp_path
    sys.modules.pop("own_letters", None)


def write(name: str, *rows: dict) -> str:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return name


def answers(*texts: str, **more) -> list[dict]:
    return [{"prompt": f"p{i}", "response": text, **more} for i, text in enumerate(texts)]


def judged(capsys, *words: str, code: int = 0) -> dict:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


OWN = ("plugins=[own_letters]", "evaluation.judge=letters")


def test_marks_of_a_file_by_hand(capsys):
    """Lengths 1, 2, 3 and 6: mean 3, deviation sqrt((4+1+0+9)/3) = 2.160247, error half of that,
    and 1.959964 of it to each side: 2.117003.
    """
    path = write("a.jsonl", *answers("a", "bb", "ccc", "dddddd", cut_off=False))
    found = judged(capsys, "--answers", path, *OWN)
    assert (found["judge"], found["answers"], found["mark"]) == ("letters", 4, 3.0)
    assert found["mark_interval"] == pytest.approx([3 - 2.117003, 3 + 2.117003], abs=2e-6)
    assert (found["length"], found["cut_off"], found["win_rate"]) == (3.0, 0.0, None)
    assert [row["mark"] for row in found["rows"]] == [1, 2, 3, 6]


def test_two_files_are_paired_by_prompt(capsys):
    """By prompt, in another order: longer, equal, shorter, longer: 2 wins, a tie, a loss: 0.625."""
    own = write("a.jsonl", *answers("aa", "b", "c", "dd"))
    other = write("b.jsonl", *reversed(answers("a", "b", "cc", "d", cut_off=True)))
    found = judged(capsys, "--answers", own, f"--against={other}", *OWN)
    assert found["win_rate"] == 0.625
    assert found["win_rate_interval"] == pytest.approx(list(wilson(0.625, 4)))
    assert (found["length"], found["against_length"]) == (1.5, 1.25)
    # Where nobody said it is not known.
    assert (found["cut_off"], found["against_cut_off"]) == (None, 1.0)
    assert [row["win"] for row in found["rows"]] == [1.0, 0.5, 0.0, 1.0]


def endpoint(url: str, *more: str) -> tuple[str, ...]:
    return (
        "evaluation.judge=endpoint",
        f"evaluation.judge_url={url}",
        "evaluation.judge_model=m",
        *more,
    )


def test_an_endpoint_compares_and_its_bill_is_on_stderr(capsys):
    own, other = (write(f"{n}.jsonl", *answers(*t)) for n, t in (("a", "xy"), ("b", ("xx", ""))))
    with judge_server(prefers_longer) as server:
        words = ("--answers", own, "--against", other, *endpoint(server.url), "--json")
        assert main(words) == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert (found["win_rate"], len(server.seen)) == (0.5, 4)
        assert "judge: 4 questions, at most" in printed.err
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]
    assert len(server.seen) == 4


def test_a_judge_without_a_verdict_is_an_error(capsys):
    own = write("a.jsonl", *answers("a", "b"))
    marks = "evaluation.judge_form=marks"
    with judge_server(lambda n, q: Act("who knows")) as server:
        assert main(["--answers", own, *endpoint(server.url, marks)]) == 2
    assert "the judge gave no verdict on 2 answers: none of its replies" in capsys.readouterr().err
    with judge_server(lambda n, q: Act("no such model", status=404)) as server:
        assert main(["--answers", own, *endpoint(server.url, marks)]) == 2
    assert "404 (no such model); check evaluation.judge_url=" in capsys.readouterr().err


def test_above_a_tenth_of_nonsense_the_mark_is_withheld_and_said(capsys):
    """One of five: marks of the others are shown, and no mean."""
    own = write("a.jsonl", *answers("bad", "b", "c", "d", "e"))

    def moody(number, question):
        return Act("hm") if "bad" in question else marks_length(number, question)

    with judge_server(moody) as server:
        found = judged(
            capsys, "--answers", own, *endpoint(server.url, "evaluation.judge_form=marks")
        )
    assert found["mark"] is None
    assert [row["mark"] for row in found["rows"]] == [None, 1, 1, 1, 1]
    assert "1 of 5 answers have no mark" in found["notes"][0]
    assert found["counts"]["nonsense"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.jsonl: it has no answers"),
        ("{}\n", "a.jsonl:1: prompt has to be a text"),
        ('{"prompt": "p"}\n', "a.jsonl:1: response has to be a text"),
        ('\n{"prompt": "p", "response": "r"}\nx\n', "a.jsonl:3: no JSON object"),
        ('{"prompt": [], "response": "r"}\n', "a.jsonl:1: prompt has to be a text, or a list"),
        ('{"prompt": "p", "response": "r", "cut_off": 1}\n', "a.jsonl:1: cut_off=1"),
    ],
)
def test_a_line_that_is_no_answer_is_named(capsys, text, said):
    Path("a.jsonl").write_text(text)
    assert main(["--answers", "a.jsonl", *OWN]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--answers is missing"),
        (("--answers", "a.jsonl"), "evaluation.judge=null sets no judge"),
        (("--answers", "no.jsonl", *OWN), "--answers=no.jsonl: No such file"),
        (("--answers", "a.jsonl", "beta=1", *OWN), "beta: `"),
        (("--answers", ".", *OWN), "--answers=.: no config.yaml there"),
        (("--answers", "a.jsonl", "--against", "b.jsonl", *OWN), "--against: no answer, or too "),
        (
            ("--answers", "a.jsonl", *endpoint("http://localhost:1/v1")),
            "evaluation.judge_form=pairs compares two answers; name others with --against",
        ),
    ],
)
def test_wrong_words_are_one_line(capsys, words, said):
    write("a.jsonl", *answers("a"))
    write("b.jsonl", {"prompt": "another", "response": "b"})
    assert main(list(words)) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_fields_that_are_not_read_are_named_and_a_table_is_shown(capsys):
    path = write("a.jsonl", *answers("a", "bb", model="x"))
    assert main(["--answers", path, "evaluation.scorer=letters", OWN[0]]) == 0
    printed = capsys.readouterr()
    assert "judge: letters" in printed.out
    assert "a.jsonl: not read: model" in printed.out


# A run's folder ----------------------------------------------------------------------------------


def run_folder(*, judge: str | None = None) -> Path:
    """A finished run with two answers of each model, as the run's judge left it."""
    folder = Path("run")
    folder.mkdir()
    (folder / "config.yaml").write_text("plugins: [own_letters]\nevaluation: {judge: letters}\n")
    samples = [
        {"prompt": "p0", "policy": "aaa", "reference": "a", "kl": 1.0, "judge": None},
        {"prompt": "p1 x", "question": "p1", "policy": "b", "reference": "bb", "judge": None},
    ]
    if judge is not None:
        samples = [row | {"win": 1.0} for row in samples]
    evaluation = {"judge": judge, "judge_failed": "it was out", "samples": samples, "answers": []}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    result = {"status": "finished", "metrics": {"samples/kl": 1.0}, "basis": {"judge": "letters"}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_run_is_judged_later_and_keeps_it(capsys):
    """Marks 3 and 1 against 1 and 2: a win and a loss."""
    folder = run_folder()
    found = judged(capsys, "--answers", "run")
    assert (found["mark"], found["against_mark"], found["win_rate"]) == (2.0, 1.5, 0.5)
    assert found["kept_in"] == "run"
    result = json.loads((folder / "result.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert {"samples/judge": 2.0, "samples/reference_judge": 1.5, "samples/win_rate": 0.5,
            "samples/kl": 1.0}.items() <= result["metrics"].items()  # fmt: skip
    assert result["basis"] == {"judge": "letters"}
    assert evaluation["judge"] == "letters"
    assert "judge_failed" not in evaluation
    assert [(row["win"], row["judge"]) for row in evaluation["samples"]] == [(1.0, 3), (0.0, 1)]
    # The prompt is that of the row, and not the text that the template made of it.
    assert [row["prompt"] for row in found["rows"]] == ["p0", "p1"]


def test_marks_of_another_judge_stay(capsys):
    folder = run_folder(judge="somebody")
    before = (folder / "evaluation.json").read_bytes(), (folder / "result.json").read_bytes()
    found = judged(capsys, "--answers", "run")
    assert found["kept_in"] is None
    assert (
        "it has marks of another judge, somebody; these are shown but not saved"
        in found["notes"][-1]
    )
    after = (folder / "evaluation.json").read_bytes(), (folder / "result.json").read_bytes()
    assert after == before


# Its page ----------------------------------------------------------------------------------------


def test_every_command_of_the_page_is_understood(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "x")
    Path("question.txt").write_text("{prompt} {first} {second}")
    Path("my_scorers.py").write_text("def brevity(prompts, answers):\n    return []\n")
    text = (ROOT / "docs" / "judges.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith("dpo-lightning judge ")]
    assert len(lines) >= 3
    for line in lines:
        words = read_words(shlex.split(line, comments=True)[2:], GRAMMAR)
        with ready_hydra():
            compose_one(list(words.settings))
    sys.modules.pop("my_scorers", None)
