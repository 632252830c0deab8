"""An adapter at another beta: its update scaled, and the measured cost of that approximation.

The optimum of beta' is the place lambda = beta / beta' on the path from the reference to the policy
of beta (logits of the reference + lambda times the difference). No weights are on that path; an
adapter whose update counts lambda times is near it, and how near is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import read_json
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.run.beta_path import place_of
from dpo_lightning.run.opened import compose_opened, open_named
from dpo_lightning.run.share.words import ADAPTER_CONFIG, Exported
from dpo_lightning.settings.schema import BASE, Config

AT_BETA_FILE = "at_beta.json"
"""What a scaled adapter costs, beside its weights."""

_WEIGHTS = "adapter_model.safetensors"
# Answers that are drawn to a prompt.
_DRAWS = 4
_FLAG = "--at-beta="


def place_in_run(exported: Exported, beta: float) -> tuple[Config, float]:
    """The settings of an export's run, and the place of a beta on its path.

    Args:
        exported: The export.
        beta: The beta that is asked for.

    Raises:
        UserError: If there is no such place, or no adapter that could be scaled to it.
    """
    typed = f"{_FLAG}{beta:g}"
    if not exported.is_adapter:
        raise UserError(
            f"{typed}: {exported.folder} is a whole model, and no weights between two models "
            "answer as the path between them does; draw from it with `generate … --at-beta`, or "
            f"train with beta={beta:g}"
        )
    if exported.run is None:
        raise UserError(
            f"{typed}: an adapter alone does not say at which beta it was trained; name its run"
        )
    _check_linear(exported, typed)
    # Answers are drawn here whatever the run itself drew, and nobody judges them.
    drawing = ["evaluation.samples=16", "evaluation.judge=none"]
    config = compose_opened(open_named(str(exported.run)), drawing)
    own = config.peft.adapter is not None and config.reference.adapter != BASE
    if own or config.reference.pretrained is not None:
        raise UserError(
            f"{typed}: the run's reference is another model than the adapter's base, so a scaled "
            f"adapter is on no path between them; train with beta={beta:g}"
        )
    return config, place_of(beta, config, trained=True, flag=_FLAG)


def _check_linear(exported: Exported, typed: str) -> None:
    """Refuses adapters of which more than the update would have to be scaled."""
    about = read_json(exported.folder / ADAPTER_CONFIG)
    for key, none in (("use_dora", False), ("modules_to_save", None), ("bias", "none")):
        if about.get(key, none) not in (none, [], {}):
            raise UserError(
                f"{typed}: the adapter has {key}={about[key]}, of which no multiple is near the "
                "path; draw from it with `generate … --at-beta`"
            )


def scale_adapter(folder: Path, factor: float) -> None:
    """Has an adapter's update count so many times.

    Args:
        folder: The adapter's, whose weights are written anew.
        factor: Number of times.
    """
    from safetensors.torch import load_file, save_file

    from dpo_lightning.evaluation.path_cost import is_linear

    path = folder / _WEIGHTS
    tensors = load_file(path)
    scaled = {
        name: (tensor * factor).to(tensor.dtype) if is_linear(name) else tensor
        for name, tensor in tensors.items()
    }
    save_file(scaled, path, metadata={"format": "pt"})


def measured_cost(
    exported: Exported, config: Config, lam: float, show: ShowPhase
) -> dict[str, Any]:
    """The cost of a scaled adapter, on held-out prompts of its run, as plain values.

    Args:
        exported: The export of the run.
        config: The run's settings, from :func:`place_in_run`.
        lam: The place.
        show: Shows how far it is.

    Raises:
        UserError: If data or models are gone.
    """
    from dpo_lightning.evaluation.path_cost import path_divergences
    from dpo_lightning.run.interpolate.experiment import opened_on_prompts

    opened = open_named(str(exported.run))
    with opened_on_prompts(config, opened, show=show) as (pair, questions, drawer):
        prompts, answers = drawer.drawn_at(lam, count=_DRAWS, seed=config.seed)
        apart = path_divergences(
            pair, prompts, answers, lam=lam, pad=drawer.pad, precision=drawer.precision
        )
    tokens = sum(map(len, answers))
    kl, reference = apart.scaled.tolist(), apart.reference.tolist()
    spread = statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else None
    return {
        "beta": config.beta / lam,
        "trained_beta": config.beta,
        "lambda": lam,
        "kl_path_scaled": statistics.fmean(kl),
        "kl_path_scaled_stderr": spread,
        "kl_path_scaled_per_token": sum(kl) / tokens,
        "kl_path_reference": statistics.fmean(reference),
        "prompts": len(questions.ids),
        "answers": len(answers),
        "max_new_tokens": drawer.longest,
        "seed": config.seed,
    }


def cost_in_words(cost: Mapping[str, Any]) -> str:
    """The cost as one paragraph of a card.

    Args:
        cost: From :func:`measured_cost`.
    """
    error = cost["kl_path_scaled_stderr"]
    spread = "" if error is None else f" ± {error:.2g}"
    return (
        f"Trained at β = {cost['trained_beta']:g}; the update of the adapter counts "
        f"{cost['lambda']:.4g} times, which stands for β = {cost['beta']:g}. This is an "
        "approximation of the policy whose logits are the reference's plus "
        f"{cost['lambda']:.4g} times the difference: their KL is {cost['kl_path_scaled']:.3g}"
        f"{spread} nats an answer ({cost['kl_path_scaled_per_token']:.2g} a token), where that "
        f"policy is {cost['kl_path_reference']:.3g} nats from the reference "
        f"({cost['answers']} answers of its own to {cost['prompts']} held-out prompts)."
    )
