"""Devices that are judged before torch is imported: GPUs that are not there, too many processes."""

from pathlib import Path

import pytest

from dpo_lightning import cli
from dpo_lightning.errors import UserError
from dpo_lightning.memory import gpus
from dpo_lightning.memory.gpus import no_gpu_because
from dpo_lightning.run import asked_devices
from dpo_lightning.run.asked_devices import check_devices
from dpo_lightning.settings.schema import TrainerConfig


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A Linux machine of two cores with a CUDA build of torch and no GPU."""
    monkeypatch.setattr(gpus.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(gpus.sys, "platform", "linux")
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(asked_devices, "cpu_cores", lambda: 2)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def found_in(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(asked_devices, "no_gpu_because", lambda: no_gpu_because(folder))


def test_the_reason_is_the_build_the_environment_or_the_machine(machine, tmp_path):
    assert no_gpu_because(tmp_path) == "this machine has no GPU"
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    assert no_gpu_because(tmp_path) == "CUDA_VISIBLE_DEVICES hides all GPUs"
    machine.setattr(gpus.metadata, "version", lambda name: "2.13.0+cpu")
    assert no_gpu_because(tmp_path) == "torch 2.13.0+cpu is a CPU build"


@pytest.mark.parametrize("node", ["nvidia0", "kfd", "dxg"])
def test_a_machine_that_may_have_one_is_left_to_torch(tmp_path, node: str):
    (tmp_path / node).touch()
    assert no_gpu_because(tmp_path) is None


def test_what_is_no_linux_is_left_to_torch(machine, tmp_path):
    machine.setattr(gpus.sys, "platform", "darwin")
    assert no_gpu_because(tmp_path) is None


@pytest.mark.parametrize(
    ("accelerator", "devices", "warning"),
    [
        ("cpu", 4, "trainer.devices=4: 4 processes share 2 CPU cores, which is slower than"),
        ("auto", 3, "trainer.devices=3: 3 processes share 2 CPU cores"),
        ("cpu", 2, None),
        ("auto", "auto", None),
        ("auto", [0, 1, 2], None),
    ],
)
def test_more_processes_than_cores_are_warned_of(
    machine, tmp_path, accelerator, devices, warning: str | None
):
    """Of two cores, and on no machine that computes on its GPUs."""
    found_in(machine, tmp_path)
    said = check_devices(TrainerConfig(accelerator=accelerator, devices=devices))
    assert said is None if warning is None else said is not None and said.startswith(warning)
    (tmp_path / "nvidia0").touch()
    with_gpu = check_devices(TrainerConfig(accelerator=accelerator, devices=devices))
    assert with_gpu == (said if accelerator == "cpu" else None)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_refused(machine, tmp_path, accelerator: str):
    found_in(machine, tmp_path)
    with pytest.raises(UserError, match=f"^trainer.accelerator={accelerator}: this machine has no"):
        check_devices(TrainerConfig(accelerator=accelerator))


def test_a_run_on_no_gpu_is_refused_without_a_folder_and_its_remedy_taken(
    machine, tmp_path, capsys
):
    """Before torch is imported: the line came after 19.5 s once."""
    found_in(machine, tmp_path / "none")
    machine.setattr(cli, "_start", lambda *_, **__: 0)
    assert cli.main(["trainer=gpu"]) == 2
    assert capsys.readouterr().err == (
        "error: trainer.accelerator=gpu: this machine has no GPU; use trainer=cpu, or a machine "
        "with a GPU\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["trainer=cpu", "trainer.devices=4"]) == 0
    assert capsys.readouterr().err.startswith("warning: trainer.devices=4: 4 processes share 2 CPU")
