"""The devices of a run and the precision on them, decided once by settings and machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from dpo_lightning.errors import UserError
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import TrainerConfig

if TYPE_CHECKING:
    import torch

PrecisionName = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


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
        """True if products are computed in 16 bits."""
        return self.precision != "32-true"

    @property
    def float16(self) -> bool:
        """True if those are float16, and the loss is scaled."""
        return self.precision == "16-mixed"

    @property
    def beside(self) -> torch.device:
        """Device of models that are not trained, such as a judge: a GPU that is there, or none."""
        import torch

        return torch.device("cuda" if self.kind == "cuda" and self.is_here else "cpu")


def decide_hardware(
    trainer: TrainerConfig, *, kind: DeviceKind | None = None, half_weights: bool = False
) -> Hardware:
    """Settles what the ``trainer`` group leaves open.

    Args:
        trainer: The group.
        kind: Kind of device, supposed to have bfloat16; None is this machine's.
        half_weights: True if the weights are held in bfloat16.

    Raises:
        UserError: If bfloat16 is asked of a GPU that only emulates it, or float16 of a device on
            which nobody scales a loss.
    """
    import torch

    own = kind or device_kind(trainer.accelerator)
    is_here = own != "cuda" or torch.cuda.is_available()
    is_asked = own == "cuda" and kind is None and is_here
    # T4 and V100 emulate it: slower than float32.
    emulates = is_asked and not torch.cuda.is_bf16_supported(including_emulation=False)
    precision = cast(PrecisionName | None, trainer.precision)
    if precision is None:
        precision = "32-true"
        if own == "cuda" and (kind is not None or is_here):
            precision = "16-mixed" if emulates else "bf16-mixed"
    if emulates:
        _refuse_bfloat16(precision, torch.cuda.get_device_name(), half_weights=half_weights)
    if own == "mps" and precision == "16-mixed":
        raise UserError(
            "trainer.precision=16-mixed: the loss is scaled on a CUDA GPU, or on a CPU, not on "
            "mps; use trainer.precision=32-true"
        )
    return Hardware(
        kind=own, is_here=is_here, count=_device_count(trainer, own), precision=precision
    )


def _refuse_bfloat16(precision: PrecisionName, device: str, *, half_weights: bool) -> None:
    """Raises where a GPU would emulate bfloat16."""
    why = f"{device} has no bfloat16, only an emulation that is slower than float32"
    if precision.startswith("bf16"):
        raise UserError(f"trainer.precision={precision}: {why}; use trainer.precision=16-mixed")
    if half_weights:
        raise UserError(
            f"model.dtype=bfloat16: {why}; use model.dtype=float32 trainer.precision=16-mixed"
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
