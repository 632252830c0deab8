"""A judge behind an address, against a server that fails, stalls, talks nonsense and is biased."""

import email.utils
import json
import logging
import time
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.endpoint_judge import EndpointJudge
from dpo_lightning.settings.judging import EndpointSettings
from tests.support.judge_server import (
    Act,
    JudgeServer,
    judge_server,
    marks_length,
    prefers_first,
    prefers_longer,
)

PROMPTS = ["Say a.", "Say b.", "Say c.", "Say d."]
OURS = ["aaaa", "b", "c", "dd"]
OTHERS = ["a", "bbb", "c", "ddd"]


def judge_of(server: JudgeServer, cache: Path, *, waits: list | None = None, **more):
    settings = EndpointSettings(**({"url": server.url, "model": "m", "form": "pairs"} | more))
    return EndpointJudge(settings, cache=cache, wait=([] if waits is None else waits).append)


def test_both_orders_decide_and_equal_answers_are_not_asked_about(tmp_path):
    """The longer answer wins: 1 of 4; c is equal to c, a tie that costs nothing; so 3 pairs, each
    twice. The win rate is (1 + 0 + 0.5 + 0) / 4.
    """
    with judge_server(prefers_longer) as server:
        judged = judge_of(server, tmp_path).compare(PROMPTS, OURS, OTHERS)
    assert judged.wins == [1.0, 0.0, 0.5, 0.0]
    assert len(server.seen) == 6
    assert {"equal": 1, "disagreed": 0, "nonsense": 0, "failed": 0}.items() <= judged.facts.items()
    assert {(body["path"], body["model"], body["temperature"]) for body in server.seen} == {
        ("/v1/chat/completions", "m", 0)
    }


def test_who_swaps_its_mind_with_the_order_gives_ties(tmp_path):
    with judge_server(prefers_first) as server:
        judged = judge_of(server, tmp_path).compare(PROMPTS, OURS, OTHERS)
    assert judged.wins == [0.5] * 4
    assert judged.facts["disagreed"] == 3


def test_what_was_answered_is_never_asked_again(tmp_path):
    """By the server's own count: the second time nothing; of one new answer its two orders."""
    with judge_server(prefers_longer) as server:
        first = judge_of(server, tmp_path).compare(PROMPTS, OURS, OTHERS)
        assert len(server.seen) == 6
        again = judge_of(server, tmp_path).compare(PROMPTS, OURS, OTHERS)
        assert len(server.seen) == 6
        assert again.wins == first.wins
        assert (again.facts["requests"], again.facts["cached"]) == (0, 6)
        judge_of(server, tmp_path).compare(PROMPTS, ["aaaa", "b", "c", "new"], OTHERS)
        assert len(server.seen) == 8
        # Another model, question or option is another judge.
        for more in ({"model": "n"}, {"template": "{prompt} {first} {second}"},
                     {"options": {"top_p": 0.5}}):  # fmt: skip
            before = len(server.seen)
            judge_of(server, tmp_path, retries=0, **more).compare(PROMPTS[:1], OURS[:1], OTHERS[:1])
            assert len(server.seen) == before + 2


def test_equal_questions_are_asked_once(tmp_path):
    with judge_server(marks_length) as server:
        judge = judge_of(server, tmp_path, form="marks")
        marks, _ = judge.mark(["p"] * 5, ["abc"] * 5)
    assert marks == [3.0] * 5
    assert len(server.seen) == 1


def test_a_damaged_mark_is_asked_for_again(tmp_path):
    with judge_server(marks_length) as server:
        judge_of(server, tmp_path, form="marks").mark(["p"], ["abc"])
        [path] = tmp_path.rglob("*.json")
        for damage in ("{", '{"key": 1}', json.dumps({"key": path.stem, "text": "none"})):
            path.write_text(damage)
            before = len(server.seen)
            marks, _ = judge_of(server, tmp_path, form="marks").mark(["p"], ["abc"])
            assert (marks, len(server.seen)) == ([3.0], before + 1)


FIRST = {
    "500": (Act("boom", status=500), 0.25, 0.5),
    "429, seconds": (Act("slow", status=429, headers={"Retry-After": "7"}), 7, 7),
    "429": (Act("slow", status=429), 0.25, 0.5),
    "503, a date": (Act("later", status=503, headers={"Retry-After": "DATE"}), 15, 20),
    "reset": (Act(reset=True), 0.25, 0.5),
    "stalls": (Act(stall=20), 0.25, 0.5),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_failure_is_tried_again_after_a_wait(tmp_path, name):
    """The first wait is half a second or less, by chance, or as long as the server asks for."""
    failure, least, most = FIRST[name]
    if "Retry-After" in failure.headers and "date" in name:
        date = email.utils.formatdate(time.time() + 20, usegmt=True)
        failure = Act(failure.text, status=503, headers={"Retry-After": date})
    waits: list[float] = []
    with judge_server(lambda n, q: failure if n == 0 else marks_length(n, q)) as server:
        judge = judge_of(server, tmp_path, waits=waits, form="marks", timeout=0.5)
        marks, facts = judge.mark(["p"], ["abc"])
    assert marks == [3.0]
    assert (facts["requests"], facts["failed"]) == (2, 0)
    [wait] = waits
    assert least <= wait <= most


def test_waits_grow_and_end(tmp_path):
    """Five attempts more than one: waits of up to 0.5, 1, 2, 4 and 8 s, at least half of each."""
    waits: list[float] = []
    with judge_server(lambda n, q: Act("down", status=503)) as server:
        judge = judge_of(server, tmp_path, waits=waits, form="marks")
        marks, facts = judge.mark(["p"], ["abc"])
    assert marks == [None]
    assert len(server.seen) == 6
    assert facts["failed"] == 1
    assert "answers 503 (down)" in facts["last_error"]
    for wait, most in zip(waits, (0.5, 1, 2, 4, 8), strict=True):
        assert most / 2 <= wait <= most


def test_a_server_that_is_gone_is_not_asked_for_ever(tmp_path):
    """After eight questions in a row without a reply nothing more is asked."""
    with judge_server(marks_length) as server:
        pass
    judge = judge_of(server, tmp_path, form="marks", retries=1, concurrency=1)
    marks, facts = judge.mark([f"p{i}" for i in range(50)], ["abc"] * 50)
    assert marks == [None] * 50
    assert facts["requests"] == 16
    assert facts["failed"] == 50


def test_a_long_wish_to_wait_is_a_refusal(tmp_path):
    waits: list[float] = []
    act = Act("", status=429, headers={"Retry-After": "3600"})
    with judge_server(lambda n, q: act) as server:
        _, facts = judge_of(server, tmp_path, waits=waits, form="marks").mark(["p"], ["a"])
    assert (waits, facts["requests"]) == ([], 1)
    assert "asks to wait 3600 s" in facts["last_error"]


def test_a_reply_that_drips_without_end_is_ended_by_the_clock(tmp_path):
    """Each attempt may take 0.5 s; the server never gets to its reply within it."""
    with judge_server(lambda n, q: Act(stall=20)) as server:
        judge = judge_of(server, tmp_path, form="marks", timeout=0.5, retries=0)
        _, facts = judge.mark(["p"], ["a"])
    assert facts["requests"] == 1
    assert "evaluation.judge_timeout=0.5" in facts["last_error"]


@pytest.mark.parametrize(
    "act",
    [
        Act("I cannot judge that."),
        Act('{"mark": NaN}'),
        Act(raw=b"<html>not json</html>"),
        Act(raw=b"[]"),
        Act(raw=b'{"choices": []}'),
        Act(raw=b'{"choices": [{"message": {"content": null}}]}'),
        Act(raw=b"\xff\xfe"),
    ],
)
def test_nonsense_is_counted_and_is_no_mark(tmp_path, act):
    """Of ten answers one: within what is borne. It is asked again the next time."""

    def one_in_ten(number, question):
        return act if "xxxxx" in question else marks_length(number, question)

    answers = ["xxxxx", *("a" * i for i in range(1, 10))]
    prompts = [f"p{i}" for i in range(10)]
    with judge_server(one_in_ten) as server:
        judge = judge_of(server, tmp_path, form="marks")
        judged = judge.compare(prompts[:5], answers[:5], answers[5:])
        assert judged.marks == [None, 1.0, 2.0, 3.0, 4.0]
        assert judged.wins == [None, 0.0, 0.0, 0.0, 0.0]
        assert judged.facts["nonsense"] == 1
        assert "1 replies could not be read" in judged.notes[0]
        # One of five answers is more than a tenth.
        assert "1 of 5 answers have no mark, more than 10%" in judged.notes[1]
        before = len(server.seen)
        judge.mark(prompts[:5], answers[:5])
    assert len(server.seen) == before + 1


@pytest.mark.parametrize(("status", "said"), [
    (401, "the key is that of MY_JUDGE; name the right variable"),
    (403, "the key is that of MY_JUDGE"),
    (404, "check evaluation.judge_url= and evaluation.judge_model="),
])  # fmt: skip
def test_what_holds_for_every_question_ends_the_round(tmp_path, monkeypatch, status, said):
    """A server may repeat the key in its refusal: it is hidden."""
    monkeypatch.setenv("MY_JUDGE", "a-key-of-no-known-form")
    act = Act("bad key a-key-of-no-known-form", status=status)
    with judge_server(lambda n, q: act) as server:
        judge = judge_of(server, tmp_path, form="marks", key_variable="MY_JUDGE", concurrency=1)
        with pytest.raises(UserError, match=said) as caught:
            judge.mark([f"p{i}" for i in range(50)], ["a"] * 50)
    assert len(server.seen) == 1
    assert "a-key-of-no-known-form" not in str(caught.value)
    assert "bad key [hidden]" in str(caught.value)
    assert server.headers[0]["Authorization"] == "Bearer a-key-of-no-known-form"


def test_the_key_is_sent_and_nowhere_else(tmp_path, monkeypatch, caplog):
    """Also where the server repeats it in a reply, which is kept."""
    monkeypatch.setenv("MY_JUDGE", "tiny-key")
    caplog.set_level(logging.DEBUG)
    act = Act('Your key is tiny-key.\n{"mark": 5}')
    with judge_server(lambda n, q: act) as server:
        judge = judge_of(server, tmp_path, form="marks", key_variable="MY_JUDGE")
        assert judge.mark(["p"], ["a"])[0] == [5.0]
    assert server.headers[0]["Authorization"] == "Bearer tiny-key"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert all(b"tiny-key" not in path.read_bytes() for path in files)
    assert "tiny-key" not in caplog.text


def test_without_a_variable_no_key_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses-key")
    with judge_server(marks_length) as server:
        judge_of(server, tmp_path, form="marks").mark(["p"], ["a"])
    assert "Authorization" not in server.headers[0]


def test_the_price_is_bounded_before_and_summed_after(tmp_path, caplog):
    """Two questions, a dollar a million tokens in and two out, replies of at most 512 tokens.

    The template "{prompt}{answer}" makes texts of 2 and 3 bytes, no tokenizer makes more tokens of
    them, and a chat template around each is taken for 64: 133 in, 1024 out, 0.000133 + 0.002048.
    The server counts 100 and 10 for each: 200 in, 20 out, 0.0002 + 0.00004.
    """
    caplog.set_level(logging.INFO)
    with judge_server(lambda n, q: Act('{"mark": 5}')) as server:
        judge = judge_of(
            server, tmp_path, form="marks", price=(1.0, 2.0), template="{prompt}{answer}"
        )
        _, facts = judge.mark(["p", "p"], ["a", "bb"])
    assert "2 questions, at most 133 tokens in and 1,024 out, price at most 0.002181" in caplog.text
    assert "2 requests, 200 tokens in and 20 out, price 0.00024" in caplog.text
    assert facts["price"] == pytest.approx(0.00024)
    # A forecast of pairs: two orders of each prompt, both answers of 10 tokens count 20 each.
    pairs = judge_of(server, tmp_path, template="{prompt}{first}{second}", price=(1.0, 2.0))
    said = pairs.forecast(["pp"], answer_tokens=10)
    # A question without answers still has their names: 2 + 7 + 8 bytes, and 40, and 64; twice.
    assert said.startswith("2 questions, at most 242 tokens in and 1,024 out")


def test_tokens_that_the_server_does_not_count_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with judge_server(lambda n, q: Act('{"mark": 5}', usage=None)) as server:
        _, facts = judge_of(server, tmp_path, form="marks").mark(["p"], ["a"])
    assert facts["uncounted"] == 1
    assert "1 replies came without token counts" in caplog.text


def test_options_change_the_body(tmp_path):
    options = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9, "seed": 1}
    with judge_server(marks_length) as server:
        judge_of(server, tmp_path, form="marks", options=options).mark(["p"], ["a"])
    [body] = server.seen
    assert body.keys() == {"model", "messages", "path", "max_completion_tokens", "seed"}


def test_a_judge_of_pairs_gives_no_marks(tmp_path):
    with judge_server(prefers_first) as server:
        judge = judge_of(server, tmp_path)
        assert not judge.gives_marks
        with pytest.raises(UserError, match="judge_form=pairs compares two answers"):
            judge.mark(["p"], ["a"])
    assert server.seen == []


def test_a_cache_that_cannot_be_written_costs_no_mark(tmp_path, caplog):
    (tmp_path / "marks").write_text("a file")
    with judge_server(marks_length) as server:
        judge = judge_of(server, tmp_path / "marks", form="marks")
        assert judge.mark(["p", "q"], ["a", "bb"])[0] == [1.0, 2.0]
    assert caplog.text.count("marks are not kept") == 1
