"""Ranks wait for the disks of others before a collective, and take no more than their own rows."""

import datetime
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.models import sharding
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.sharding import like_shard, shard_model
from dpo_lightning.training.meetings import meet
from dpo_lightning.training.ranks import Ranks
from dpo_lightning.training.strategies import ShardedStrategy
from tests.support.models import make_model
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")


def late(folder: Path, name: str) -> str:
    """A slow disk: time passes, and then the file is there."""
    time.sleep(0.3)
    (folder / name).touch()
    return name


def _waits(rank: int, folder: Path) -> list[Any]:
    """Values of rank 0, and for each collective True if what it waited for was there."""
    ranks = Ranks(rank, 2, CPU, init_device_mesh("cpu", (2,)))
    entered: list[bool] = []
    real = torch.distributed.broadcast_object_list

    def broadcast(*arguments: Any, **options: Any) -> None:
        entered.append(len(list(folder.glob("*.disk"))) == len(entered) + 1)
        real(*arguments, **options)

    with mock.patch.object(torch.distributed, "broadcast_object_list", broadcast):
        # Rank 0 reads for both; then the other one comes late; then rank 0 fails.
        first = ranks.from_first(lambda: late(folder, "1.disk"))
        if rank == 1:
            late(folder, "2.disk")
        second = ranks.from_first(lambda: 7)

        def fail() -> None:
            late(folder, "3.disk")
            raise UserError("no such file")

        with pytest.raises(UserError, match="no such file"):
            ranks.from_first(fail)
    strategy = ShardedStrategy(timeout=datetime.timedelta(minutes=1))

    def barrier() -> None:
        entered.append((folder / "written").exists())

    with mock.patch.object(torch.distributed, "barrier", barrier):
        if rank == 0:
            late(folder, "written")
        strategy.barrier()
    return [first, second, entered]


def _handed_out(rank: int, folder: Path) -> dict[str, Any]:
    """The model as it came out of shares, and the largest piece that a device was sent."""
    mesh = init_device_mesh("cpu", (2,))
    whole = make_model("gpt2")
    policy = whole if rank == 0 else meta_model(whole.config, dtype=torch.float32)
    pieces: list[tuple[int, ...]] = []
    real = torch.distributed.scatter

    def scatter(piece: torch.Tensor, *arguments: Any, **options: Any) -> None:
        pieces.append(tuple(piece.shape))
        real(piece, *arguments, **options)

    # Of a matrix of 32 columns in float32 eight rows for each of the two.
    with (
        mock.patch.object(sharding, "_PIECE_BYTES", 2 * 8 * 32 * 4),
        mock.patch.object(torch.distributed, "scatter", scatter),
    ):
        shard_model(policy, mesh, CPU, compute_dtype=None)
    back = {name: p.full_tensor().detach().numpy() for name, p in policy.named_parameters()}
    for rows in (1, 2, 5, 8):
        full = torch.arange(rows * 3.0).view(rows, 3)
        shard = distribute_tensor(torch.zeros(rows, 3), mesh, [Shard(0)])
        found = like_shard(full, shard)
        assert torch.equal(found.full_tensor(), full)
        own, expected = found.to_local(), distribute_tensor(full, mesh, [Shard(0)]).to_local()
        assert torch.equal(own, expected)
        # Its own rows alone, and not a view of all.
        assert own.untyped_storage().nbytes() == expected.numel() * 4
    return {"weights": back, "pieces": pieces}


def _both(rank: int, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    return _waits(rank, folder), _handed_out(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(_both, folder, folder)


def test_a_rank_is_waited_for_before_a_collective_begins(ranks):
    """A collective that is entered too early is ended by its time limit."""
    for waits, _ in ranks:
        assert waits == ["1.disk", 7, [True, True, True, True]]


def test_each_device_is_sent_its_own_rows_some_at_a_time(ranks):
    """97 rows of 32 columns: shares of 49 and 48 rows, which come eight at a time."""
    expected = dict(make_model("gpt2").named_parameters())
    for _, found in ranks:
        assert found["weights"].keys() == expected.keys()
        for name, weight in expected.items():
            assert (found["weights"][name] == weight.detach().numpy()).all(), name
        rows = [piece[0] for piece in found["pieces"] if piece[1:] == (32,)]
        assert max(rows) == 8
        assert rows.count(8) > 6


def test_one_process_meets_nobody():
    meet()


def test_who_waits_in_vain_says_so(monkeypatch):
    """One arrival of two, and none to come."""

    class Store:
        def add(self, name: str, number: int) -> int:
            return 1

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr("dpo_lightning.training.meetings._get_default_store", Store)
    with pytest.raises(DpoLightningError, match="rank 0 waited 0:00:00 for 1 other"):
        meet(datetime.timedelta())
