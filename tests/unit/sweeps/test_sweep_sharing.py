"""Trials that share a GPU: as many as fit by their estimates, and never more."""

import os
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.memory.footprint import GIB
from dpo_lightning.memory.gpus import memory_of_gpus
from dpo_lightning.sweeps.places import leases, local
from dpo_lightning.sweeps.places.base import Demand, Work
from dpo_lightning.sweeps.places.leases import DevicePool
from dpo_lightning.sweeps.places.local import LocalSite
from dpo_lightning.sweeps.places.sharing import (
    estimate_apart,
    estimated_shares,
    fixed_shares,
    most_at_once,
)
from dpo_lightning.sweeps.trials import Plan, Trial
from tests.support.trials import plan

A, B = (f"GPU-{letter * 8}-0000-1111-2222-333344445555" for letter in "ab")
SMALL, LARGE = 20 * GIB, 50 * GIB


def plans(*kinds: str, width: int = 1) -> list[Plan]:
    """Trials on GPUs, by what decides their memory."""
    made = [plan(f"t{n}", "", width=width, kind="cuda") for n in range(len(kinds))]
    return [replace(one, memory=kind) for one, kind in zip(made, kinds, strict=True)]


def estimate(runs):
    """Small runs take 20 GiB and large ones 50, by their first argument, on any GPU."""
    return [SMALL if arguments[0] == "small" else LARGE for _, arguments in runs]


def asked(*kinds: str) -> list[Plan]:
    return [replace(one, arguments=(one.memory,)) for one in plans(*kinds)]


def test_shares_follow_from_the_estimates():
    """Of 80 GiB estimates may come to 74.4: 20 is 25/93 of it, so three fit; 50 is 125/186."""
    made = asked("small", "large", "small")
    shares = estimated_shares(made, {A: 80 * GIB}, most=4, estimate=estimate)
    assert [shares[one.settings_hash][A] for one in made] == [
        Fraction(25, 93),
        Fraction(125, 186),
        Fraction(25, 93),
    ]
    assert most_at_once(A, shares) == 3
    assert most_at_once(B, shares) == 1


def test_a_share_is_no_smaller_than_one_of_the_most_and_no_larger_than_all():
    """20 of 400 GiB is a twentieth, and four run at most; 50 of 40 GiB is all of it."""
    made = asked("small", "large")
    shares = estimated_shares(made, {A: 400 * GIB, B: 40 * GIB}, most=4, estimate=estimate)
    small, large = (shares[one.settings_hash] for one in made)
    assert (small[A], small[B]) == (Fraction(1, 4), Fraction(50, 93))
    assert (large[A], large[B]) == (Fraction(1, 4), 1)


def test_each_kind_of_run_is_estimated_once_for_each_kind_of_gpu():
    seen = []

    def counted(runs):
        seen.extend(runs)
        return estimate(runs)

    made = asked("small", "small", "large", "small")
    estimated_shares(made, {A: 80 * GIB, B: 80 * GIB}, most=4, estimate=counted)
    assert seen == [(80 * GIB, ("small",)), (80 * GIB, ("large",))]


def test_without_an_estimate_each_has_a_gpu_of_its_own_and_that_is_said(caplog):
    def fails(runs):
        raise ValueError("error: model.pretrained=x: no such folder")

    made = asked("small", "small")
    assert estimated_shares(made, {A: 80 * GIB}, most=4, estimate=fails) == {}
    assert "each has a GPU of its own: error: model.pretrained=x" in caplog.text


@pytest.mark.parametrize(("most", "memory", "width"), [(1, {A: 1}, 1), (4, {}, 1), (4, {A: 1}, 2)])
def test_where_nothing_can_be_shared_nothing_is_estimated(most, memory, width):
    made = plans("small", "small", width=width)
    assert estimated_shares(made, memory, most=most, estimate=lambda runs: 1 / 0) == {}


def test_a_pool_gives_the_emptiest_gpu_and_no_more_than_all_of_one():
    """A third, a third and a half on two GPUs: the half does not fit beside two thirds."""
    third, half = (dict.fromkeys((A, B), Fraction(1, n)) for n in (3, 2))
    pool = DevicePool("cuda", [A, B])
    one, two, three = (pool.take(1, third) for _ in range(3))
    assert [lease.devices for lease in (one, two, three)] == [(A,), (B,), (A,)]
    assert pool.take(1, half).devices == (B,)
    assert not pool.has(1, half)
    assert pool.take(1, half) is None
    assert pool.take(1) is None
    pool.give_back(one)
    assert not pool.has(2)
    assert pool.take(1, half).devices == (A,)
    assert pool.take(1, third) is None
    pool.give_back(two)
    assert pool.take(1, third).devices == (B,)


def test_a_trial_on_several_gpus_has_them_alone():
    third = dict.fromkeys((A, B), Fraction(1, 3))
    pool = DevicePool("cuda", [A, B])
    lease = pool.take(1, third)
    assert not pool.has(2, third)
    pool.give_back(lease)
    wide = pool.take(2, third)
    assert (wide.devices, wide.share) == ((A, B), 1)
    assert not pool.has(1, third)


def test_whatever_is_taken_and_given_back_no_gpu_holds_more_than_all_of_itself():
    draw = random.Random(1)
    pool, held = DevicePool("cuda", [A, B]), []
    parts = [{A: Fraction(a, 7), B: Fraction(b, 5)} for a in (1, 3, 7) for b in (1, 2, 5)]
    for _ in range(1000):
        if held and draw.random() < 0.5:
            pool.give_back(held.pop(draw.randrange(len(held))))
        elif lease := pool.take(draw.choice([1, 1, 1, 2]), draw.choice(parts)):
            held.append(lease)
        for device in (A, B):
            assert sum(lease.share for lease in held if device in lease.devices) <= 1
    while held:
        pool.give_back(held.pop())
    assert pool.has(2)


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """A stand-in for the program, with two GPUs of 80 GiB; called with their modes."""
    monkeypatch.setattr(leases, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(leases, "_cores", lambda: range(16))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def lists(*modes: str) -> None:
        gpus = "\n".join(f"GPU {n}: NVIDIA H100 (UUID: {uuid})" for n, uuid in enumerate((A, B)))
        rows = "\n".join(f"{u}, 81920, {m}" for u, m in zip((A, B), modes, strict=True))
        (tmp_path / "gpus").write_text(f"{gpus}\n")
        (tmp_path / "rows").write_text(f"{rows}\n")
        (tmp_path / "nvidia-smi").write_text(
            f"#!/bin/sh\ncase $1 in -L) cat {tmp_path / 'gpus'};; "
            f"--query-gpu=uuid,memory.total,compute_mode) cat {tmp_path / 'rows'};; "
            "*) exit 3;; esac\n"
        )
        (tmp_path / "nvidia-smi").chmod(0o755)

    return lists


def test_memory_is_that_of_gpus_that_take_several_programs(nvidia_smi):
    nvidia_smi("Default", "Exclusive_Process")
    assert memory_of_gpus() == {A: 80 * GIB}
    nvidia_smi("Default", "Default")
    assert memory_of_gpus() == {A: 80 * GIB, B: 80 * GIB}


def starts(site: LocalSite, made: list[Plan], folder: Path) -> list[str]:
    """The GPUs of the trials that a place starts at once, and their share of the 16 cores."""
    found = []
    with site.open(Work(made, folder, ("-c", "import time; time.sleep(600)"), {})) as place:
        attempts = []
        for one in made:
            trial = Trial(one, folder / one.name)
            trial.folder.mkdir(exist_ok=True)
            if place.fits(trial):
                attempts.append(place.start(trial))
                found += attempts[-1].labels
        found.append(place._environment.get("OMP_NUM_THREADS", "the user's"))
        for attempt in attempts:
            attempt.kill()
    return found


@pytest.mark.parametrize(
    ("options", "kinds", "started"),
    [
        # Three of 20 GiB on each of two: six at a time, and 16 // 6 cores each.
        ({}, ["small"] * 8, ["a", "b"] * 3 + ["2"]),
        # One large one and one small one: 50 + 20 GiB.
        ({}, ["large", "large", "small", "small", "small"], ["a", "b", "a", "b", "2"]),
        # No more trials than GPUs: each has its own.
        ({}, ["small"] * 2, ["a", "b", "8"]),
        ({"trials_per_device": 1}, ["small"] * 8, ["a", "b", "8"]),
        ({"trials_per_device": 2}, ["large"] * 8, ["a", "b", "a", "b", "4"]),
    ],
)
def test_a_sweep_starts_as_many_trials_on_a_gpu_as_fit(
    nvidia_smi, monkeypatch, tmp_path, options, kinds, started
):
    nvidia_smi("Default", "Default")
    for name in leases.THREAD_LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "estimate_apart", estimate)
    site = LocalSite(devices="auto", max_failures=None, retries=0, **options)
    made = asked(*kinds)
    found = starts(site, made, tmp_path)
    assert [label.replace("cuda:GPU-", "")[:1] for label in found] == started


def test_a_gpu_that_takes_one_program_is_one_trials_at_a_time(nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi("Exclusive_Process", "Default")
    monkeypatch.setattr(local, "estimate_apart", estimate)
    site = LocalSite(devices="auto", max_failures=None, retries=0)
    found = starts(site, asked(*["small"] * 8), tmp_path)[:-1]
    assert sorted(label[9:10] for label in found) == ["a", "b", "b", "b"]


@pytest.mark.parametrize("count", [0, -1, 1.5, "two", None, True])
def test_a_wrong_count_is_refused(count):
    site = LocalSite(devices="auto", max_failures=None, retries=0, trials_per_device=count)
    with pytest.raises(UserError, match=r"^hydra\.launcher\.trials_per_device="):
        site.check()


def test_on_a_cpu_the_count_is_refused_with_the_key_for_it():
    site = LocalSite(devices="auto", max_failures=None, retries=0, trials_per_device=3)
    site.check()
    with pytest.raises(UserError, match=r"trials_per_device=3: .*hydra\.launcher\.devices=3"):
        site.check_trials([Demand("cpu", 1, 1)])


def test_a_count_gives_equal_parts_to_trials_of_one_gpu():
    made = plans("small", "large")
    shares = fixed_shares([*made, *plans("small", width=2)], [A, B], 3)
    assert shares == {one.settings_hash: {A: Fraction(1, 3), B: Fraction(1, 3)} for one in made}


@pytest.mark.long
@pytest.mark.slow  # imports everything in a process of its own
def test_the_estimate_is_that_of_preflight():
    from dpo_lightning.run.needs import estimated_bytes
    from dpo_lightning.settings.compose import ready_hydra

    words = ("--config-name", "config", "data.micro_batch_tokens=2048", "hydra.mode=RUN")
    more = (*words, "data.micro_batch_tokens=16384")
    [small, large] = estimate_apart([(80 * GIB, words), (80 * GIB, more)])
    with ready_hydra():
        assert small == estimated_bytes(words, 80 * GIB)
    assert 0 < small < large < 80 * GIB
    with pytest.raises(ValueError, match=r"^error: beta"):
        estimate_apart([(80 * GIB, ("beta=x",))])
