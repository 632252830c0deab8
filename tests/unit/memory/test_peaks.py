"""Memory that the C library keeps: given back when it is asked to."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_lightning.memory import peaks


def resident() -> int:
    """Bytes of this process in memory."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_pieces_between_what_is_held_are_given_back():
    """2,000 arrays of 64 KiB, of which every second is freed: 62.5 MiB lie between the others."""
    held = [np.ones(1 << 16, dtype=np.uint8) for _ in range(2000)]
    del held[::2]
    before = resident()
    peaks.give_back_memory()
    assert resident() < before - (40 << 20)
    assert all(array[0] == 1 for array in held)


def test_a_check_gives_back_with_every_third_call(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(peaks, "give_back_memory", lambda: calls.append("give back"))
    check = peaks.giving_back(lambda: calls.append("check"), every=3)
    for _ in range(6):
        check()
    assert calls == [*["check"] * 3, "give back", *["check"] * 3, "give back"]


def test_a_check_that_raises_is_not_held_up():
    def gone() -> None:
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        peaks.giving_back(gone, every=1)()
