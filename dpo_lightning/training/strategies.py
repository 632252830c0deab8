"""Lightning's FSDP2 strategy for a model that is sharded already.

Its checkpoints are for any number of ranks: whole tensors under one process's names.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from dpo_lightning.models.sharding import in_shards, like_shard, whole_tensor
from dpo_lightning.training.meetings import meet


class ShardedStrategy(ModelParallelStrategy):
    """Data-parallel strategy over all ranks, each of which has its shards.

    Args:
        timeout: Longest time that a rank waits for the others.
    """

    def __init__(self, *, timeout: datetime.timedelta) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)

    def start(self) -> DeviceMesh:
        """Starts the other processes of this machine and meets all, before any training."""
        if self.launcher is not None:
            self.launcher.launch(lambda: None)
        self._setup_distributed()
        return init_device_mesh(self.root_device.type, (self.world_size,))

    def setup_environment(self) -> None:
        """Sets all ranks to share the data; none splits a layer."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def barrier(self, name: str | None = None) -> None:
        """Meets all ranks, of which one may be late by a disk, and then on their devices."""
        meet()
        super().barrier(name)

    # One process's format, both ways ----------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the optimizer is restored the way one process would do it."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0, nothing on the others; a meeting of all ranks.

        What a checkpoint leaves out, frozen weights, stays where it is.
        """
        assert self.lightning_module is not None
        left_out: frozenset[str] = getattr(self.lightning_module, "unsaved", frozenset())
        for module in self.lightning_module.modules():
            in_shards(module)
        keep = self.is_global_zero
        state = {
            name: whole_tensor(tensor, keep=keep)
            for name, tensor in self.lightning_module.state_dict().items()
            if name not in left_out
        }
        return state if keep else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its shards of the whole tensors."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {
            name: like_shard(whole, own[name]) if name in own else whole
            for name, whole in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole moments on rank 0, nothing on the others; a meeting of all ranks."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        keep = self.is_global_zero
        whole = {
            number: {
                name: whole_tensor(value, keep=keep) if isinstance(value, torch.Tensor) else value
                for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
        return {**state, "state": whole} if keep else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its shards of the whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shards = {
                number: {
                    name: like_shard(value, parameters[number])
                    if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
                    else value
                    for name, value in moments.items()
                }
                for number, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Saves a checkpoint from rank 0."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)
