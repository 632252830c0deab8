"""Device slots: those of a machine, those of a trial, and the trial's environment."""

import os
import random
import types

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.sweeps.places import leases
from dpo_lightning.sweeps.places.leases import DevicePool, kind_of_trial, make_pool, visible_gpus


def test_a_lease_is_exclusive_until_it_is_given_back():
    pool = DevicePool("cuda", ["4", "5", "7"])
    one, two = pool.take(2), pool.take(1)
    assert (one.devices, two.devices) == (("4", "5"), ("7",))
    assert one.labels == ["cuda:4", "cuda:5"]
    assert pool.take(1) is None
    pool.give_back(one)
    assert pool.take(3) is None
    pool.give_back(two)
    assert pool.take(3).devices == ("4", "5", "7")


def test_whatever_is_taken_and_given_back_no_device_is_held_twice():
    draw = random.Random(0)
    pool = DevicePool("cpu", [str(n) for n in range(5)])
    held = []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            pool.give_back(held.pop(draw.randrange(len(held))))
        elif lease := pool.take(draw.randint(1, 3)):
            held.append(lease)
        devices = [device for lease in held for device in lease.devices]
        assert len(devices) == len(set(devices))
    while held:
        pool.give_back(held.pop())
    assert pool.take(5).devices == tuple("01234")


def test_a_trial_sees_its_gpus_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(leases, "_cores", lambda: range(8))
    pool = DevicePool("cuda", ["4", "GPU-abc"])
    said = pool.environment(pool.take(2), {"MKL_NUM_THREADS": "3"})
    assert said["CUDA_VISIBLE_DEVICES"] == "4,GPU-abc"
    assert said["OMP_NUM_THREADS"] == "4"
    assert "MKL_NUM_THREADS" not in said
    cpus = DevicePool("cpu", ["0", "1", "2"])
    said = cpus.environment(cpus.take(1), {})
    assert said["CUDA_VISIBLE_DEVICES"] == ""
    assert said["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("accelerator", "gpus", "kind"),
    [
        ("auto", [], "cpu"),
        ("auto", ["0"], "cuda"),
        ("cpu", ["0"], "cpu"),
        ("gpu", [], "cuda"),
        ("cuda", ["0"], "cuda"),
        ("mps", [], "mps"),
    ],
)
def test_the_accelerator_says_what_kind_of_device(accelerator, gpus, kind):
    assert kind_of_trial(accelerator, gpus) == kind


@pytest.mark.parametrize(
    ("kind", "wanted", "gpus", "devices"),
    [
        ("cuda", "auto", ["2", "3"], ("2", "3")),
        ("cuda", 1, ["2", "3"], ("2",)),
        ("cuda", [1], ["2", "3"], ("3",)),
        ("cuda", ["1", "0"], ["2", "3"], ("3", "2")),
        ("cuda", ["GPU-abc"], ["2", "3"], ("GPU-abc",)),
        ("cpu", "auto", [], ("0", "1", "2")),
        ("cpu", 6, [], ("0", "1", "2", "3", "4", "5")),
        ("cpu", [0, 5], ["2"], ("0", "5")),
        ("mps", "auto", [], ("0",)),
    ],
)
def test_the_slots(monkeypatch, kind, wanted, gpus, devices):
    monkeypatch.setattr(leases, "_cores", lambda: range(3))
    assert make_pool(kind, wanted, gpus).devices == devices


def test_many_cores_are_shared_by_four_trials(monkeypatch):
    monkeypatch.setattr(leases, "_cores", lambda: range(64))
    pool = make_pool("cpu", "auto", [])
    assert len(pool.devices) == 4
    assert pool.environment(pool.take(1), {})["OMP_NUM_THREADS"] == "16"


@pytest.mark.parametrize(
    ("wanted", "gpus", "said"),
    [("auto", [], "no CUDA device"), (3, ["0"], "1 CUDA devices"), ([5], ["0"], "numbered from 0")],
)
def test_devices_that_are_not_there_are_refused(wanted, gpus, said):
    with pytest.raises(UserError, match=said):
        make_pool("cuda", wanted, gpus)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1,3", ["1", "3"]),
        (" GPU-abc , MIG-x ", ["GPU-abc", "MIG-x"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["0"]),
    ],
)
def test_cuda_visible_devices_is_honoured(monkeypatch, visible, names):
    monkeypatch.setattr(leases, "_torch_has_cuda", lambda: True)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == names


def test_without_the_variable_the_driver_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(leases, "_torch_has_cuda", lambda: True)
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --query-gpu=index ] && printf "0\\n1\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus({}) == ["0", "1"]
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert visible_gpus({}) == []


@pytest.mark.parametrize(
    ("text", "has_cuda"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("cuda = '12.6'\n", True),
        ("cuda = None\nhip = '6.4'\n", True),
    ],
)
def test_a_torch_without_cuda_has_no_gpus(monkeypatch, tmp_path, text, has_cuda):
    (tmp_path / "version.py").write_text(text)
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(leases.importlib.util, "find_spec", lambda name: spec)
    assert bool(visible_gpus({"CUDA_VISIBLE_DEVICES": "0"})) is has_cuda
