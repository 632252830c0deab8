"""Facts about the machine that the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate", "dpo-lightning")


def describe_machine(threads: int, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Date, processor, device, versions.

    Args:
        threads: CPU threads that were measured with.
        packages: Those whose versions count.
    """
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def matrix_rate(precision: str, *, threads: int) -> float:
    """FLOPs per second of large matrix products, the most that a model could hope for."""
    import torch

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 4 * 2 * n**3 / (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(5))
