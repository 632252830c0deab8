"""Damaged checkpoints and caches: found out, passed over, recomputed or refused, never used."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from dpo_lightning.data import token_cache
from dpo_lightning.data.tokens import tokenize_groups
from dpo_lightning.training.checkpoints.files import CHECKPOINTS, find_checkpoint, find_damage
from tests.support import reference_caches as reference_cache
from tests.support.models import byte_tokenizer
from tests.support.recovery import assert_same_end, checkpoint
from tests.support.runs import TINY, Run, run_train
from tests.support.token_caches import GROUPS, TEMPLATE, same, tokens

pytestmark = pytest.mark.faults

LONG = (
    *TINY,
    *("checkpoint.every_n_steps=2", "checkpoint.keep=9", "evaluation.partition_samples=0"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *LONG)
    assert run.code == 0
    return run


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def folder(whole: Run, tmp_path) -> Path:
    shutil.copytree(whole.folder / CHECKPOINTS, tmp_path / "run" / CHECKPOINTS)
    return tmp_path / "run"


@pytest.mark.parametrize("tenth", range(10))
def test_a_checkpoint_cut_at_every_tenth_is_passed_over(whole: Run, folder, tenth: int):
    newest = folder / CHECKPOINTS / "step-000006.ckpt"
    os.truncate(newest, newest.stat().st_size * tenth // 10)
    found = find_checkpoint("auto", folder)
    assert found.name == "step-000004.ckpt"
    if tenth in (0, 5):
        resumed = run_train(folder, *LONG, "resume=auto")
        assert resumed.result["resumed"]["step"] == 4
        assert_same_end(resumed, whole, after=4)
        named = run_train(folder.parent / "other", *LONG, f"resume={newest}")
        assert named.code == 0  # it was written anew


def test_flipped_bits_anywhere_in_a_checkpoint_are_found(folder):
    newest = folder / CHECKPOINTS / "step-000006.ckpt"
    whole = newest.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        newest.write_bytes(data)
        assert find_damage(newest) is not None
    newest.write_bytes(whole)
    assert find_damage(newest) is None


def test_with_every_checkpoint_damaged_auto_starts_anew(whole: Run, folder):
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        os.truncate(path, 1000)
    run = run_train(folder, *LONG, "resume=auto")
    assert "no intact checkpoint" in (folder / "train.log").read_text()
    assert run.result["resumed"] is None
    assert_same_end(run, whole, after=0)
    named = run_train(folder.parent / "other", *LONG, f"resume={checkpoint(run, 2)}")
    assert named.code == 0


def test_a_token_file_with_any_byte_flipped_is_never_used(tmp_path, tokenizer):
    """Places all over the file, its header and its words about dropped rows included."""
    expected = tokenize_groups(GROUPS, tokenizer, max_length=60, truncation="drop")
    tokens(tmp_path, tokenizer)
    [path] = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 200)):
        for bit in (0, 3, 5):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            assert same(tokens(tmp_path, tokenizer), expected), (place, bit)
            path.write_bytes(data)


def test_a_reference_file_with_any_byte_flipped_is_never_used(tmp_path):
    cache = reference_cache.ReferenceCache(tmp_path, reference_cache.FACTS)
    reference_cache.fill(cache, reference_cache.GROUPS)
    path = reference_cache.only_part(cache)
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        parts, _ = reference_cache.fill(cache, reference_cache.GROUPS)
        reference_cache.check(parts)
        for other in cache.path.glob("*.safetensors"):
            other.unlink()
        path.write_bytes(data)


def test_a_killed_holder_of_the_token_lock_is_followed_by_another(tmp_path, tokenizer):
    """A run is killed in the middle of its work; the next one finds no lock and does it."""
    context = multiprocessing.get_context("fork")
    started, waits = context.Event(), context.Event()

    def hold() -> None:
        def endless(*args, **kwargs):
            started.set()
            while True:
                time.sleep(1)

        token_cache.tokenize_groups = endless
        tokens(tmp_path, tokenizer)

    def wait() -> None:
        token_cache._say_waiting = waits.set
        tokens(tmp_path, tokenizer)

    holder, waiting = context.Process(target=hold), context.Process(target=wait)
    holder.start()
    assert started.wait(120)
    waiting.start()
    assert waits.wait(120)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    waiting.join(120)
    assert waiting.exitcode == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    expected = tokenize_groups(GROUPS, tokenizer, max_length=60, truncation="drop")
    assert same(tokens(tmp_path, tokenizer), expected)
