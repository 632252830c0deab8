"""Device slots: those of a machine, those of a trial, and the trial's environment."""

import logging
import os
import random
import types

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.sweeps.places import leases
from dpo_lightning.sweeps.places.leases import (
    DevicePool,
    check_width,
    kind_of_trial,
    make_pool,
    thread_limits,
    visible_gpus,
)


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


def test_a_trial_sees_its_gpus():
    pool = DevicePool("cuda", ["4", "GPU-abc"])
    assert pool.environment(pool.take(2)) == {"CUDA_VISIBLE_DEVICES": "4,GPU-abc"}
    cpus = DevicePool("cpu", ["0", "1", "2"])
    assert cpus.environment(cpus.take(1)) == {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("cores", "slots", "threads"), [(8, 2, "4"), (8, 3, "2"), (2, 4, "1"), (64, 4, "16")]
)
def test_each_trial_has_its_share_of_the_cores(monkeypatch, cores, slots, threads):
    """NumPy would start its threads when it is imported; what the user has set stays."""
    monkeypatch.setattr(leases, "_cores", lambda: range(cores))
    limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}
    assert thread_limits(slots, {}) == limits
    given = {"MKL_NUM_THREADS": "3"}
    assert thread_limits(slots, given) == {k: v for k, v in limits.items() if k not in given}


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


@pytest.mark.parametrize(
    ("wanted", "gpus", "said"),
    [("auto", [], "no CUDA device"), (3, ["0"], "1 CUDA devices"), ([5], ["0"], "numbered from 0")],
)
def test_devices_that_are_not_there_are_refused(wanted, gpus, said):
    with pytest.raises(UserError, match=said):
        make_pool("cuda", wanted, gpus)


# What nvidia-smi -L lists: two models, and a GPU that is cut into two slices.
FAST, SLOW, CUT = (f"GPU-{d * 8}-0000-1111-2222-333344445555" for d in "abc")
SLICES = [f"MIG-{d * 8}-5555-5afc-978f-d2f129440900" for d in "de"]
A100, L4 = "NVIDIA A100-SXM4-40GB", "NVIDIA L4"
MIXED = f"""\
GPU 0: {L4} (UUID: {SLOW})
GPU 1: {A100} (UUID: {FAST})
GPU 2: {A100} (UUID: {CUT})
  MIG 3g.20gb     Device  0: (UUID: {SLICES[0]})
  MIG 1g.5gb      Device  1: (UUID: {SLICES[1]})
"""
ALIKE = f"GPU 0: {L4} (UUID: {SLOW})\nGPU 1: {L4} (UUID: {FAST})\n"


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """A stand-in for the program; called with what it lists, or None for one that fails."""
    monkeypatch.setattr(leases, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def lists(text: str | None) -> None:
        (tmp_path / "listed").write_text(text or "")
        said = "echo no driver; exit 9" if text is None else f"cat {tmp_path / 'listed'}"
        (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 3\n{said}\n')
        (tmp_path / "nvidia-smi").chmod(0o755)

    return lists


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
def test_cuda_visible_devices_is_honoured_where_nobody_lists_them(nvidia_smi, visible, names):
    nvidia_smi(None)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == names


def test_without_the_variable_the_driver_is_asked(nvidia_smi):
    nvidia_smi(ALIKE)
    assert visible_gpus({}) == [SLOW, FAST]
    nvidia_smi(None)
    assert visible_gpus({}) == []


def test_a_gpu_that_is_cut_is_used_by_its_slices(nvidia_smi):
    nvidia_smi(MIXED)
    assert visible_gpus({}) == [SLOW, FAST, *SLICES]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1,0", [FAST, SLOW]),
        (f"{FAST},0", [FAST, SLOW]),
        ("GPU-bbbb", [SLOW]),
        ("2", SLICES),
        (f"{CUT},1", [*SLICES, FAST]),
        (SLICES[1], [SLICES[1]]),
        (f"MIG-{CUT}/1/0", [f"MIG-{CUT}/1/0"]),
        ("0,0,1", [SLOW, FAST]),
        ("1,-1,0", [FAST]),
    ],
)
def test_what_is_visible_is_named_by_uuid(nvidia_smi, visible, names):
    nvidia_smi(MIXED)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == names


@pytest.mark.parametrize("name", ["7", "GPU-ffff", "GPU-", "MIG-"])
def test_from_a_name_that_is_none_on_nothing_is_visible_and_that_is_said(nvidia_smi, caplog, name):
    """As in CUDA; the beginning of two UUIDs is the name of neither."""
    nvidia_smi(MIXED)
    environment = {"CUDA_VISIBLE_DEVICES": f"1,{name},0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_gpus(environment) == [FAST]
    [record] = caplog.records
    assert record.getMessage().startswith(f"CUDA_VISIBLE_DEVICES=1,{name},0: nvidia-smi lists no ")


@pytest.mark.parametrize(
    ("listed", "environment", "said"),
    [
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0"}, True),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, True),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False),
        (MIXED, {"CUDA_VISIBLE_DEVICES": FAST}, False),
        (MIXED, {}, False),
        (ALIKE, {"CUDA_VISIBLE_DEVICES": "0"}, False),
    ],
)
def test_a_number_that_may_mean_another_gpu_to_cuda_is_said(
    nvidia_smi, caplog, listed, environment, said
):
    caplog.set_level(logging.WARNING)
    nvidia_smi(listed)
    visible_gpus(environment)
    assert ("in the order of the bus" in caplog.text) == said


def test_a_trial_is_given_a_uuid_and_its_reader_the_beginning_of_it(nvidia_smi):
    nvidia_smi(MIXED)
    pool = make_pool("cuda", [1, SLICES[1][:9]], visible_gpus({}))
    assert pool.devices == (FAST, SLICES[1])
    lease = pool.take(1)
    assert pool.environment(lease)["CUDA_VISIBLE_DEVICES"] == FAST
    assert lease.labels == ["cuda:GPU-aaaaaaaa"]
    assert pool.take(1).labels == ["cuda:MIG-eeeeeeee"]


def test_a_device_that_is_named_twice_is_refused(nvidia_smi):
    nvidia_smi(ALIKE)
    with pytest.raises(UserError, match="GPU-aaaaaaaa is named twice"):
        make_pool("cuda", [1, FAST], visible_gpus({}))


def test_a_trial_on_several_slices_is_refused(nvidia_smi):
    """A program sees one slice, whatever it is given."""
    nvidia_smi(MIXED)
    gpus = visible_gpus({})
    check_width(1, make_pool("cuda", "auto", gpus))
    check_width(2, make_pool("cuda", [SLOW, FAST], gpus))
    with pytest.raises(UserError, match=r"^trainer\.devices=2: MIG-dddddddd is a slice of a GPU"):
        check_width(2, make_pool("cuda", "auto", gpus))
    with pytest.raises(UserError, match=r"^trainer\.devices=3: the sweep has 2 cuda devices;"):
        check_width(3, make_pool("cuda", [SLOW, FAST], gpus))


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
