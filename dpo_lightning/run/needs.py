"""Program that estimates the memory of runs, apart from the sweep, which imports no torch.

Standard input is a JSON list of pairs, the bytes of a GPU and the arguments of a run; standard
output is a list with the bytes that each takes of it. It loads no weights and uses no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dpo_lightning.memory.estimate import (
    MemoryEstimate,
    estimate_of,
    memory_settings,
    step_memory_of,
)
from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.run.guard import guarded
from dpo_lightning.settings.compose import compose_one
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import Config


def estimate_for(
    config: Config, kind: DeviceKind | None, device_bytes: int | None
) -> MemoryEstimate:
    """The memory of a run by its settings and its model's config alone.

    Args:
        config: The validated settings.
        kind: Kind of the devices; None: that of the settings.
        device_bytes: Memory of a device; None asks it.
    """
    # Here, because it imports torch: by now every setting is checked.
    from dpo_lightning.models.source import load_model_config
    from dpo_lightning.training.traced import traced_optimizer

    settings = memory_settings(config)
    model_config = load_model_config(
        pretrained=config.model.pretrained,
        revision=config.model.revision,
        config=config.model.config,
        config_overrides=config.model.config_overrides,
    )
    return estimate_of(
        settings,
        decide_hardware(config.trainer, kind=kind, half_weights=settings.half_weights),
        step_memory_of(settings, model_config, make_optimizer=traced_optimizer),
        device_bytes=device_bytes,
    )


def estimated_bytes(arguments: Sequence[str], device_bytes: int) -> int:
    """The memory of a run, with the micro-batch that it would choose on a GPU.

    Args:
        arguments: The run's.
        device_bytes: Memory of the GPU.

    Raises:
        UserError: If its settings are wrong.
    """
    return estimate_for(compose_one([*arguments]), "cuda", device_bytes).footprint.total


def _main(_: list[str]) -> int:
    runs = json.load(sys.stdin)
    print(json.dumps([estimated_bytes(arguments, size) for size, arguments in runs]))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(_main, []))
