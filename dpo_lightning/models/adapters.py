"""LoRA beside a policy's frozen weights, which are also the reference.

PEFT puts its layers into the transformers model itself, which stays what everybody works with: its
attention, decoder, head and ``generate`` are where they were. PEFT's own wrapper around it is kept
for what it does best: switching adapters, and writing them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from dpo_lightning.errors import UserError
from dpo_lightning.models.adapter_files import CONFIG_FILE, AdapterFile
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.sharding import put_tensor, run_whole, whole_tensor

# PEFT's name of the adapter that is trained, which its files do not carry.
_TRAINED = "default"
_REFERENCE = "reference"
_COPY = "moving"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A new adapter.

    Attributes:
        r: Rank.
        alpha: Scale, over the rank or its square root.
        target_modules: Names of modules; None for all linear layers but the head.
        rslora: True if the scale is over the square root of the rank.
        dora: True if directions and lengths are trained apart.
        gaussian: True if the first matrix is drawn from a normal distribution.
    """

    r: int
    alpha: int
    target_modules: Sequence[str] | None
    rslora: bool
    dora: bool
    gaussian: bool

    def arguments(self) -> dict[str, Any]:
        """Arguments of PEFT's ``LoraConfig``."""
        names = self.target_modules
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "target_modules": "all-linear" if names is None else list(names),
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "init_lora_weights": "gaussian" if self.gaussian else True,
        }


class Adapters:
    """The trained adapter, and the reference in the same model.

    Args:
        policy: A transformers causal language model; from here on its weights are frozen and those
            of an adapter are trained.
        start: A new adapter, or a stored one to go on with.
        reference: A stored adapter that, frozen, is the reference; None: no adapter is.
        dropout: Of the trained adapter's input.
        seed: Of new matrices.
        load_base: Loads the base model again.
        moves: True adds a frozen copy of the trained adapter as it starts, for a reference that
            moves.

    Raises:
        UserError: If an adapter does not fit the model, or would train its head.

    Attributes:
        reference: The policy as the reference.
        copy: The policy with that copy in place of the trained adapter; None where there is none.
    """

    def __init__(
        self,
        policy: Any,
        start: LoraSettings | AdapterFile,
        *,
        reference: AdapterFile | None,
        dropout: float,
        seed: int,
        load_base: Callable[[], Any],
        moves: bool = False,
    ) -> None:
        self.policy = policy
        self._load_base = load_base
        self._start, self._dropout, self._seed = start, dropout, seed
        self._types = {name: value.dtype for name, value in policy.state_dict().items()}
        head, embeddings = policy.get_output_embeddings(), policy.get_input_embeddings()
        self._tied = head.weight is embeddings.weight
        stored = start if isinstance(start, AdapterFile) else None
        name = "peft" if stored is None else stored.name
        arguments = start.settings if isinstance(start, AdapterFile) else start.arguments()
        # Ranks and resumed runs start from the same matrices, whatever was drawn before.
        with torch.random.fork_rng(devices=[]), _fitting(name):
            torch.manual_seed(seed)
            config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=dropout, **arguments)
            self._peft = get_peft_model(policy, config)
        self._refuse_head(name)
        if stored is not None:
            self._fill(_TRAINED, stored)
        self._has_reference = reference is not None
        if reference is not None:
            with torch.random.fork_rng(devices=[]), _fitting(reference.name):
                config = LoraConfig(task_type="CAUSAL_LM", **reference.settings)
                self._peft.add_adapter(_REFERENCE, config)
            self._refuse_head(reference.name)
            self._fill(_REFERENCE, reference)
        if moves:
            self._add_copy(name)
        wrapper: Any = self._peft
        self._tuner = wrapper.base_model
        self._tuner.set_adapter(_TRAINED)
        if moves:
            self._fill_copy()
        self.reference = ReferenceView(self, _REFERENCE if reference is not None else None)
        self.copy = ReferenceView(self, _COPY) if moves else None

    @property
    def has_stored_reference(self) -> bool:
        """True if the reference is an adapter too, and not the base model alone."""
        return self._has_reference

    @staticmethod
    def name_of_copy(name: str) -> str:
        """The name of a trained weight in the copy that moves."""
        before, _, after = f"{name}.".rpartition(f".{_TRAINED}.")
        return f"{before}.{_COPY}.{after}".removesuffix(".")

    @contextlib.contextmanager
    def switched(self, adapter: str | None) -> Iterator[None]:
        """Context in which the policy is the reference, in eval mode; then it is as it was.

        Args:
            adapter: Name of the adapter that it then has; None: none.
        """
        training = [module for module in self.policy.modules() if module.training]
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.policy.eval()
        if adapter is not None:
            self._tuner.set_adapter(adapter, inference_mode=True)
        else:
            self._tuner.disable_adapter_layers()
        # PEFT freezes what it turns off. Shards ask in their first pass, which may be this one,
        # what is trained, and take the type of its gradients from that.
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            if adapter is not None:
                self._tuner.set_adapter(_TRAINED)
            else:
                self._tuner.enable_adapter_layers()
            for module in training:
                module.training = True

    def describe(self) -> str:
        """One line about what is trained."""
        config: Any = self._peft.peft_config[_TRAINED]
        kind = "DoRA" if config.use_dora else "LoRA"
        over = "sqrt(rank)" if config.use_rslora else "rank"
        layers = (name for name, m in self.policy.named_modules() if isinstance(m, BaseTunerLayer))
        where = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        line = f"{kind} of rank {config.r}, alpha {config.lora_alpha:g} over {over}, on {where}"
        if config.lora_dropout:
            line += f"; dropout {config.lora_dropout:g} of its input"
        if getattr(self.policy, "is_quantized", False):
            line += "; frozen weights in 4 bits (nf4)"
        return line

    @torch.no_grad()
    def restore_base(self) -> None:
        """Restores frozen weights that were rounded to the numbers that they are stored in."""
        rounded = {
            own: parameter
            for name, parameter in self.policy.named_parameters()
            if (own := _base_name(name)) in self._types and parameter.dtype != self._types[own]
        }
        if rounded:
            stored = self._load_base().state_dict()
            for own, parameter in rounded.items():
                parameter.data = stored[own].to(parameter.device)

    def save(self, folder: Path, *, base: str | None, revision: str | None) -> None:
        """Writes the trained adapter as PEFT does.

        Args:
            folder: Folder to write to.
            base: Folder or hub id of the base model; None where nobody else has it.
            revision: Its revision on the hub.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._peft.save_pretrained(
                str(folder), selected_adapters=[_TRAINED], save_embedding_layers=False
            )
        path = folder / CONFIG_FILE
        values = json.loads(path.read_text())
        values |= {"base_model_name_or_path": base, "revision": revision}
        if isinstance(values["target_modules"], list):
            values["target_modules"].sort()
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def gathered(self, *, keep: bool, with_base: bool) -> Adapters | None:
        """An ordinary copy of a trained adapter that ranks share; a meeting of all of them.

        The base is not gathered: where it is needed, rank 0 reads it as it is stored.

        Args:
            keep: True if this rank wants it, on the CPU; the others get None.
            with_base: True with the base model's weights, False without any: enough to save it.
        """
        trained = {
            name: whole_tensor(parameter.detach(), keep=keep)
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }
        if not keep:
            return None
        base = self._load_base() if with_base else meta_model(self.policy.config)
        copy = Adapters(
            base,
            self._start,
            reference=None,
            dropout=self._dropout,
            seed=self._seed,
            load_base=self._load_base,
        )
        for name, tensor in trained.items():
            assert tensor is not None
            put_tensor(base, name, tensor)
        base.eval()
        return copy

    def merge(self) -> Any:
        """Adds the trained adapter into the weights; only the plain model is left."""
        return self._tuner.merge_and_unload(adapter_names=[_TRAINED])

    def _add_copy(self, name: str) -> None:
        """Puts a second adapter of the trained one's form beside it."""
        config: Any = copy.deepcopy(self._peft.peft_config[_TRAINED])
        config.lora_dropout = 0.0
        # On a rank that is handed its share later PEFT would make it on the CPU.
        is_meta = next(self.policy.parameters()).is_meta
        place = torch.device("meta") if is_meta else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), _fitting(name), place:
            self._peft.add_adapter(_COPY, config)

    @torch.no_grad()
    def _fill_copy(self) -> None:
        """Gives that adapter the values with which the trained one starts."""
        for name, weight in self.policy.named_parameters():
            if weight.requires_grad:
                self.policy.get_parameter(self.name_of_copy(name)).copy_(weight)

    def _fill(self, adapter: str, file: AdapterFile) -> None:
        """Gives an adapter its stored weights, all of them and none else."""
        own = get_peft_model_state_dict(
            self._peft, adapter_name=adapter, save_embedding_layers=False
        )
        stored = dict(file.weights)
        problems = [f"{name} is not in it" for name in own if name not in stored]
        problems += [f"{name} has no place in this model" for name in stored if name not in own]
        problems += [
            f"{name} is {tuple(stored[name].shape)} in it and {tuple(value.shape)} here"
            for name, value in own.items()
            if name in stored and stored[name].shape != value.shape
        ]
        if problems:
            raise UserError(
                f"{file.name}: {len(problems)} weights do not fit the model, the first: "
                f"{problems[0]}; it was trained on {file.base or 'another model'}"
            )
        with warnings.catch_warnings():
            # A rank that is handed its share later has no weights here to fill.
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(self._peft, stored, adapter_name=adapter)

    def _refuse_head(self, name: str) -> None:
        """Excludes the head from training: its gradient would be the dearest of a step."""
        layers = [self.policy.get_output_embeddings()]
        if self._tied:
            layers.append(self.policy.get_input_embeddings())
        for layer in layers:
            if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
                [path] = [n for n, module in self.policy.named_modules() if module is layer]
                raise UserError(
                    f"{name}: its target_modules or modules_to_save have {path}, the model's head, "
                    "which stays frozen; leave it out"
                )


class ReferenceView:
    """The policy as its own reference: each call is made with the reference's weights.

    It can be used beside the policy, wherever a frozen model can.

    Args:
        adapters: Of the policy.
        adapter: Name of the one that is the reference; None: the model without any.
    """

    training = False

    def __init__(self, adapters: Adapters, adapter: str | None = None) -> None:
        self._adapters = adapters
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapters.policy, name)

    @property
    def viewed(self) -> Any:
        """The policy itself."""
        return self._adapters.policy

    def run_whole(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the policy whose weights are gathered, as ``sharding.run_whole``."""
        with self._adapters.switched(self._adapter):
            return run_whole(self._adapters.policy, function, *arguments)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """A forward pass."""
        with self._adapters.switched(self._adapter):
            return self._adapters.policy(*arguments, **named)

    def base_model(self, *arguments: Any, **named: Any) -> Any:
        """A forward pass of the decoder, without the head."""
        with self._adapters.switched(self._adapter):
            return self._adapters.policy.base_model(*arguments, **named)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """Generates, as transformers does."""
        with self._adapters.switched(self._adapter):
            return self._adapters.policy.generate(*arguments, **named)

    def eval(self) -> ReferenceView:
        """Does nothing: the reference is always in eval mode."""
        return self

    def train(self, mode: bool = True) -> ReferenceView:
        """Does nothing: the reference is never trained."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ReferenceView:
        """Does nothing: the trained weights are the policy's."""
        return self

    def to(self, device: torch.device) -> ReferenceView:
        """Moves the policy."""
        self._adapters.policy.to(device)
        return self


def _base_name(name: str) -> str:
    """Returns the name that a frozen weight had before adapters were put around its module."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


@contextlib.contextmanager
def adapter_dropout_off(policy: Any) -> Iterator[None]:
    """Turns the dropout of adapters off, whatever the mode of the policy."""
    found = [
        module
        for name, module in policy.named_modules()
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name and module.training
    ]
    for module in found:
        module.eval()
    try:
        yield
    finally:
        for module in found:
            module.train()


def count_parameters(policy: Any) -> tuple[int, int]:
    """A policy's weights and the trained ones among them, without the reference's adapters.

    Args:
        policy: A model, with or without adapters, its weights in any type.
    """
    total = trained = 0
    for name, parameter in policy.named_parameters():
        if any(f".{own}." in f"{name}." for own in (_REFERENCE, _COPY)):
            continue
        # Of weights in 4 bits two are in a byte.
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return total, trained


@contextlib.contextmanager
def _fitting(name: str) -> Iterator[None]:
    """Turns PEFT's errors about modules into a user's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, TypeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{name}: {text[:300]}; name modules that this model has") from error
