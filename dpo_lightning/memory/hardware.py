"""The devices of a run and the precision on them, decided once by settings and machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import TrainerConfig

if TYPE_CHECKING:
    import torch

PrecisionName = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices of a run, and what is computed in on them.

    Attributes:
        kind: Kind of device.
        is_here: False for GPUs that this machine has none of.
        count: Processes that share a step.
        precision: ``trainer.precision``, decided.
    """

    kind: DeviceKind
    is_here: bool
    count: int
    precision: PrecisionName

    @property
    def mixed(self) -> bool:
        """True for bfloat16 beside float32."""
        return self.precision == "bf16-mixed"

    @property
    def beside(self) -> torch.device:
        """Device of models that are not trained, such as a judge: a GPU that is there, or none."""
        import torch

        return torch.device("cuda" if self.kind == "cuda" and self.is_here else "cpu")


def decide_hardware(trainer: TrainerConfig, *, kind: DeviceKind | None = None) -> Hardware:
    """Settles what the ``trainer`` group leaves open.

    Args:
        trainer: The group.
        kind: Kind of device, supposed to have bfloat16; None is this machine's.
    """
    import torch

    own = kind or device_kind(trainer.accelerator)
    is_here = own != "cuda" or torch.cuda.is_available()
    half = own == "cuda" and (
        # Emulated, as on a T4 or V100, it is slower than float32.
        kind is not None
        or (is_here and bool(torch.cuda.is_bf16_supported(including_emulation=False)))
    )
    if trainer.precision is not None:
        half = trainer.precision != "32-true"
    return Hardware(
        kind=own,
        is_here=is_here,
        count=_device_count(trainer, own),
        precision="bf16-mixed" if half else "32-true",
    )


def device_kind(accelerator: str) -> DeviceKind:
    """The kind of device that ``trainer.accelerator`` comes to on this machine."""
    import torch

    if accelerator == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return {"cpu": "cpu", "mps": "mps"}.get(accelerator, "cuda")  # type: ignore[return-value]


def _device_count(trainer: TrainerConfig, kind: DeviceKind) -> int:
    """Processes that share a step."""
    import torch

    devices = trainer.devices
    if devices == "auto":
        count = torch.cuda.device_count() if kind == "cuda" else 1
    else:
        count = len(devices) if isinstance(devices, list) else devices
    return max(1, count) * trainer.num_nodes
