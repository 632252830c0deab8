"""A ring of processes, one for each card: each sends to the next, then all add up.

``python -m dpo_lightning.run.doctor.ring FOLDER RANK COUNT BACKEND`` is one of them.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.run.doctor.checks import Finding
from dpo_lightning.settings.program import importing

# How long a process waits for another one, and the whole ring may take, imports included.
_WAIT_SECONDS, _WHOLE_SECONDS = 30.0, 120.0
_POLL_SECONDS = 0.05
_ENTRIES = 1 << 20


def check_ring() -> Finding:
    """All cards of this machine in a ring (NCCL), or two processes of its CPU (gloo)."""
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards == 1:
        return "ok", "one card, so there is nothing between cards"
    backend, count = ("nccl", cards) if cards else ("gloo", 2)
    what = f"{count} {'cards' if cards else 'processes of the CPU'}, {backend}"
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        faults = _run_ring(Path(folder), count, backend)
    if faults:
        return "failed", (
            f"{what}: {'; '.join(faults)}; NCCL_DEBUG=INFO says more"
            if cards
            else f"{what}: {'; '.join(faults)}; GLOO_SOCKET_IFNAME=lo names the network to use"
        )
    return "ok", f"{what}: each sends to the next, and all add up"


def _run_ring(folder: Path, count: int, backend: str) -> list[str]:
    """Starts the processes and waits for them; what each that failed says."""
    environment = importing(os.environ) | {"OMP_NUM_THREADS": "1"}
    ranks: list[subprocess.Popen[bytes]] = []
    for number in range(count):
        words = [sys.executable, "-m", __name__, str(folder), str(number), str(count), backend]
        with (folder / f"{number}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )
    try:
        deadline = time.monotonic() + _WHOLE_SECONDS
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    faults = [_fault_of(folder, number) for number in range(count)]
    return [fault for fault in faults if fault is not None]


def _fault_of(folder: Path, rank: int) -> str | None:
    """A process's fault; None if it has none."""
    try:
        found = json.loads((folder / f"{rank}.json").read_text())
    except (OSError, ValueError):
        lines = (folder / f"{rank}.log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{rank} did not end ({last[:120]})" if last else f"{rank} did not answer"
    return None if found["fault"] is None else str(found["fault"])


def be_rank(folder: Path, rank: int, count: int, backend: str) -> str | None:
    """One process of the ring.

    Args:
        folder: A folder of all of them.
        rank: Its number, and that of its card.
        count: Number of processes.
        backend: ``nccl`` or ``gloo``.

    Returns:
        What came out wrong; None if nothing did.
    """
    import torch
    from torch import distributed

    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=_WAIT_SECONDS),
    )
    try:
        before, behind = (rank - 1) % count, (rank + 1) % count
        own = torch.full((_ENTRIES,), float(rank + 1), device=device)
        received = torch.zeros_like(own)
        operations = [
            distributed.P2POp(distributed.isend, own, behind),
            distributed.P2POp(distributed.irecv, received, before),
        ]
        for request in distributed.batch_isend_irecv(operations):
            request.wait()
        distributed.all_reduce(own)
        # Only now, so that nobody waits for one that has found a fault.
        if not bool((received == before + 1).all()):
            return f"what {rank} received from {before} is not what was sent"
        if not bool((own == count * (count + 1) / 2).all()):
            return f"{rank} has another sum than that of all"
    finally:
        distributed.destroy_process_group()
    return None


def main(argv: Sequence[str]) -> int:
    """Runs one process of the ring and leaves what came out of it."""
    folder, rank, count, backend = argv
    fault = be_rank(Path(folder), int(rank), int(count), backend)
    (Path(folder) / f"{rank}.json").write_text(json.dumps({"fault": fault}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
