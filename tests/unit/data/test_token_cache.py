"""Token ids on disk: found again, never stale, never damaged."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_lightning.data import token_cache
from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.tokens import tokenize_groups
from tests.support.models import byte_tokenizer
from tests.support.token_caches import GROUPS, TEMPLATE, group, same, tokens


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def count(monkeypatch):
    """Sizes of the calls in which rows were really turned into tokens."""
    calls = []

    def counted(groups, *args, **kwargs):
        calls.append(len(groups))
        return tokenize_groups(groups, *args, **kwargs)

    monkeypatch.setattr(token_cache, "tokenize_groups", counted)
    return calls


def test_what_is_found_is_what_was_made(tmp_path, tokenizer, count):
    plain = tokenize_groups(GROUPS, tokenizer, max_length=60, truncation="drop")
    assert plain.dropped
    assert same(tokens(tmp_path / "new", tokenizer), plain)
    assert same(tokens(tmp_path / "new", tokenizer), plain)
    assert count == [5]


def test_nothing_left_is_a_result_too(tmp_path, tokenizer, count):
    for _ in range(2):
        found = tokens(tmp_path, tokenizer, GROUPS[1:2])
        assert (found.groups, found.dropped["too_long"]) == ([], 1)
    assert count == [1]


def changed_text(t, g):
    return t, [*g[:-1], group("Add 1.", " 2", " 5", weight=2.5, source="f:5")], {}


def changed_rank(t, g):
    return (
        t,
        [*g[:2], group(g[2].prompt, *g[2].responses, ranks=(1, 1, 2), source="f:3"), *g[3:]],
        {},
    )


def changed_weight(t, g):
    return t, [*g[:-1], group("Add 1.", " 2", " 4", weight=2.0, source="f:5")], {}


def changed_order(t, g):
    return t, g[::-1], {}


def fewer(t, g):
    return t, g[:-1], {}


def changed_template(t, g):
    t.chat_template = TEMPLATE + " "
    return t, g, {}


def changed_tokenizer(t, g):
    t.add_tokens(["Add"])
    return t, g, {}


def changed_eos(t, g):
    t.eos_token = "<pad>"
    return t, g, {}


@pytest.mark.parametrize(
    "change",
    [
        changed_text, changed_rank, changed_weight, changed_order, fewer, changed_template,
        changed_tokenizer, changed_eos,
        lambda t, g: (t, g, {"max_length": 61}),
        lambda t, g: (t, g, {"truncation": "response"}),
    ],
)  # fmt: skip
def test_whatever_changes_the_tokens_is_made_anew(tmp_path, tokenizer, count, change):
    tokens(tmp_path, tokenizer)
    other, groups, limits = change(copy.deepcopy(tokenizer), list(GROUPS))
    found = tokens(tmp_path, other, groups, **limits)
    assert len(count) == 2
    limits = {"max_length": 60, "truncation": "drop"} | limits
    assert same(found, tokenize_groups(groups, other, **limits))


def test_another_place_of_the_same_rows_is_found_with_its_own_names(tmp_path, tokenizer, count):
    tokens(tmp_path, tokenizer)
    moved = [
        PreferenceGroup(g.prompt, g.responses, g.ranks, g.weight, None, f"other:{i}")
        for i, g in enumerate(GROUPS)
    ]
    found = tokens(tmp_path, tokenizer, moved)
    assert count == [5]
    assert [g.source for g in found.groups] == ["other:0", "other:2", "other:4"]


def test_another_margin_of_the_same_rows_is_theirs(tmp_path, tokenizer, count):
    """The token ids do not depend on it, so they are found."""
    assert {g.target_margin for g in tokens(tmp_path, tokenizer).groups} == {0.0}
    rows = [replace(g, target_margin=0.5 * i) for i, g in enumerate(GROUPS)]
    found = tokens(tmp_path, tokenizer, rows)
    assert count == [5]
    assert [g.target_margin for g in found.groups] == [0.0, 1.0, 2.0]
    assert same(found, tokenize_groups(rows, tokenizer, max_length=60, truncation="drop"))


def flip(path):
    arrays = load_file(path)
    arrays["ids"][0] ^= 1
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-9]),
     lambda p: save_file({"ids": np.zeros(3, dtype=np.int32)}, p)],
)  # fmt: skip
def test_a_damaged_file_is_made_anew(tmp_path, tokenizer, count, caplog, damage):
    expected = tokens(tmp_path, tokenizer)
    [path] = tmp_path.glob("*.safetensors")
    damage(path)
    assert same(tokens(tmp_path, tokenizer), expected)
    assert "damaged" in caplog.text
    assert same(tokens(tmp_path, tokenizer), expected)
    assert count == [5, 5]


def test_a_folder_that_cannot_be_used_costs_a_line(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    found = tokens(tmp_path / "file", tokenizer)
    assert same(found, tokenize_groups(GROUPS, tokenizer, max_length=60, truncation="drop"))
    assert "token ids could not be cached" in caplog.text


def test_of_two_processes_one_makes_them(tmp_path, tokenizer):
    import multiprocessing

    context = multiprocessing.get_context("fork")
    calls, waiting = context.SimpleQueue(), context.Semaphore(0)

    def work() -> None:
        def slow(groups, *args, **kwargs):
            calls.put(len(groups))
            # Both others wait for the lock by then.
            for _ in range(2):
                assert waiting.acquire(timeout=120)
            return tokenize_groups(groups, *args, **kwargs)

        token_cache.tokenize_groups = slow
        token_cache._say_waiting = waiting.release
        assert len(tokens(tmp_path, tokenizer).groups) == 3

    workers = [context.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert calls.get() == 5
    assert calls.empty()
