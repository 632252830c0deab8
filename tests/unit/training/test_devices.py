"""Each process takes its own GPU before anything is loaded; a stand-in records what it takes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_lightning.errors import UserError
from dpo_lightning.models import loading
from dpo_lightning.models.quantization import Quantized
from dpo_lightning.run import session
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.devices import check_there, take_device

SLURM = {
    **{"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"},
    "SLURM_LOCALID": "3",
}
TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"},
    **{"GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
}


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Numbers of the GPUs that were made the current one, of four that are there."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found[-1] if found else 0)
    for name in (*SLURM, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("environment", "devices", "expected"),
    [
        ({}, "auto", [0]),
        ({}, 1, [0]),
        ({"LOCAL_RANK": "2"}, 4, [2]),
        ({"LOCAL_RANK": "2"}, "auto", [2]),
        # A list names them; the first process has the first one of it, also where it is alone.
        ({}, [3], [3]),
        ({"LOCAL_RANK": "1"}, [3, 1], [1]),
        (SLURM, 4, [3]),
        (TORCHRUN, 8, [1]),
        # Left to Lightning, which says what is wrong.
        ({"LOCAL_RANK": "4"}, 5, []),
        ({}, [7], []),
        ({"LOCAL_RANK": "1"}, [0], []),
    ],
)
def test_a_process_takes_the_gpu_of_its_number(
    taken, monkeypatch, environment: dict[str, str], devices: Any, expected: list[int]
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    take_device("gpu", devices)
    assert taken == expected


@pytest.mark.parametrize("accelerator", ["cpu", "mps"])
def test_what_computes_elsewhere_takes_no_gpu(taken, accelerator: str):
    take_device(accelerator, 1)
    assert taken == []


@pytest.mark.parametrize(
    ("accelerator", "devices", "message"),
    [
        ("gpu", 5, "trainer.devices=5: there is no GPU 4, torch sees 4 here, numbered from 0; use"),
        ("auto", [1, 6], "trainer.devices=[1, 6]: there is no GPU 6, torch sees 4 here"),
        ("mps", 1, "trainer.accelerator=mps: torch sees no such device; use trainer=cpu"),
    ],
)
def test_devices_that_are_not_there_are_refused(taken, accelerator, devices, message: str):
    with pytest.raises(UserError) as caught:
        check_there(accelerator, devices)
    assert str(caught.value).startswith(message)
    for right in ("auto", 4, [3]):
        check_there("gpu", right)
    check_there("cpu", 9)
    assert taken == []


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(None, f"torch {torch.__version__} is a CPU build"), ("13", "torch sees no GPU here")],
)
def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch, cuda: str | None, reason: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError) as caught:
        check_there("gpu", "auto")
    assert str(caught.value) == (
        f"trainer.accelerator=gpu: {reason}; use trainer=cpu, or a machine with a GPU"
    )
    check_there("auto", "auto")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check_there("gpu", 1)


def test_it_is_taken_before_hardware_is_asked_or_a_model_is_loaded(taken, monkeypatch, tmp_path):
    """Rank 1 of two; whatever comes after has its GPU as the current one."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyError(torch.cuda.current_device())

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(session.pl, "seed_everything", lambda *_, **__: None)
    monkeypatch.setattr(session, "decide_hardware", stop)
    config = Config()
    config.trainer.accelerator, config.trainer.devices = "gpu", 2
    with pytest.raises(KeyError, match="1"):
        session.run_experiment(
            config,
            None,
            folder=SimpleNamespace(path=tmp_path),
            resolved={},
            record=None,
            signals=None,
            children=None,
        )
    assert taken == [1]


@pytest.mark.parametrize(("kind", "expected"), [("cuda", 2), ("cpu", "cpu")])
def test_weights_in_four_bits_go_to_the_process_s_own_gpu(
    taken, monkeypatch, kind: str, expected: Any
):
    """transformers takes the first GPU where none is named, also for a run on the CPU."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(loading, "check_has_weights", lambda *_, **__: None)
    monkeypatch.setattr(loading, "check_weights", lambda *_, **__: None)
    monkeypatch.setattr(
        loading.AutoModelForCausalLM,
        "from_pretrained",
        lambda source, **options: (seen.update(options), {}),
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    take_device("gpu", 4)
    loading.load_model(
        "a/b",
        SimpleNamespace(to_dict=dict),
        key="model.pretrained",
        dtype=torch.bfloat16,
        quantization=Quantized("a config", torch.device(kind)),
    )
    assert seen["device_map"] == {"": expected}
    assert seen["quantization_config"] == "a config"
