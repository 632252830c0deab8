"""Preparation of the process that trials are forked from, ahead of what they need.

As a run does: its settings for libraries that read them when they are imported. And other than a
run, which may: torchao, which transformers imports where it is installed, asks for a device when it
is imported, and CUDA that was initialized before a fork cannot be used in it. So it is put off
until something is done with it.
"""

import importlib.util
import os
import sys
from typing import Any

from dpo_lightning.memory.segments import allocate_in_segments
from dpo_lightning.tracking.quiet import quiet_loggers

_ASKED = "is_torchao_available"


def _flatten(state: Any) -> Any:
    """As the function of torchao by whose name transformers knows it."""
    from torchao.prototype.safetensors import safetensors_support  # type: ignore[import-untyped]

    return safetensors_support.flatten_tensor_state_dict(state)


def _put_off_torchao() -> None:
    """Imports transformers' own module for torchao as if that were not installed."""
    if importlib.util.find_spec("torchao") is None:
        return
    from transformers import utils
    from transformers.utils import quantization_config  # noqa: F401 - which asks for itself

    real = getattr(utils, _ASKED)

    def denied(*_: Any, **__: Any) -> bool:
        return False

    setattr(utils, _ASKED, denied)
    try:
        quantizer = importlib.import_module("transformers.quantizers.quantizer_torchao")
    finally:
        for name, module in [*sys.modules.items()]:
            if name.startswith("transformers.") and vars(module).get(_ASKED) is denied:
                setattr(module, _ASKED, real)
    quantizer.flatten_tensor_state_dict = _flatten  # type: ignore[attr-defined]


os.environ["HYDRA_FULL_ERROR"] = "1"
quiet_loggers()
allocate_in_segments(os.environ)
_put_off_torchao()
