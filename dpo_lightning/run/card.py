"""The card of an exported model: what it was trained on, how, and what came of it.

It is made of ``result.json`` and ``config.yaml``, as values, so that a run and a later export write
the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dpo_lightning.data.labels import LabelCounts
from dpo_lightning.data.source_names import entries, is_hub_id, is_local_data
from dpo_lightning.settings.schema import BASE

_TAGS = ("dpo", "dpo-lightning", "preference-optimization")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """A run as its card tells of it.

    Attributes:
        name: Name of the run's folder.
        result: As in ``result.json``.
        settings: As in ``config.yaml``.
    """

    name: str
    result: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def hub_base(self) -> str | None:
        """Hub id of the base model; None where it is of this machine, or random."""
        source = self.settings["model"]["pretrained"]
        if source is None or Path(source).exists() or not is_hub_id(source):
            return None
        return str(source)


def model_card(facts: CardFacts, *, adapter: bool) -> ModelCard:
    """The card.

    Args:
        facts: Of the run.
        adapter: True for an adapter alone, which needs its base model.
    """
    result, base = facts.result, facts.hub_base
    data = ModelCardData(
        # The hub takes no folder here.
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, *(["lora"] if adapter else [])],
    )
    metrics = ((f"`{name}`", _number(value)) for name, value in sorted(result["metrics"].items()))
    text = f"""---
{data.to_yaml()}
---

# {facts.name}

Trained from `{result["model"]["name"]}` on preferences with the `{result["loss"]}` loss at
β = {result["beta"]:g} by [Direct Preference Optimization](https://arxiv.org/abs/2305.18290).

## Training

{_table(("setting", "value"), _training(facts))}

## Data

{_table(("data", "value"), _data(facts))}

## Results

{_table(("metric", "last value"), metrics)}

## Use

{_use(facts, adapter=adapter)}

## Command

```
{result["command"]}
```
"""
    return ModelCard(text)


def _training(facts: CardFacts) -> Iterator[tuple[str, str]]:
    result, settings = facts.result, facts.settings
    peft = settings["peft"]
    yield "loss", f"`{result['loss']}`"
    yield "β", f"{result['beta']:g}"
    yield "learning rate", f"{settings['optimizer']['lr']:g}, {settings['optimizer']['schedule']}"
    yield "optimizer", f"`{settings['optimizer']['name']}`"
    yield "steps", f"{result['step']} x {settings['data']['batch_size']} prompts"
    yield "seed", str(result["seed"])
    yield "reference", _reference(settings["reference"], peft)
    every = settings["reference"].get("sync_every")  # not in settings of before
    if every is not None:
        share = settings["reference"]["sync_alpha"]
        yield "reference's updates", f"every {every:,} steps, the policy's share {share:g}"
    if peft["kind"] == "none":
        yield "trained", "all weights"
    else:
        yield "trained", f"LoRA of rank {peft['r']}, alpha {peft['alpha']:g}"
    model = result["model"]
    yield "parameters", f"{model['parameters']:,}, of which {model['trainable']:,} are trained"


def _reference(reference: Mapping[str, Any], peft: Mapping[str, Any]) -> str:
    """The reference in words; folders of this machine by their last part."""
    if reference["kind"] == "none":
        return "none"
    for source in (reference["pretrained"], reference["adapter"]):
        if source == BASE:
            return "the base model"
        if source is not None:
            return f"`{_public(source)}`"
    return "the initial policy" if peft["adapter"] is None else f"`{_public(peft['adapter'])}`"


def _data(facts: CardFacts) -> Iterator[tuple[str, str]]:
    data, train = facts.result["data"], facts.settings["data"]["train"]
    if train is None:
        yield "rows", "the controlled task, which is embedded in dpo-lightning"
    else:
        yield "rows", ", ".join(f"`{_public(entry.path)}`" for entry in entries(train))
    if "hash" in data:  # not in results of before
        yield "hash of the rows' tokens", f"`{data['hash']}`"
    yield "training groups", f"{data['train_groups']:,}"
    yield "held-out groups", f"{data['eval_groups']:,}"
    if "labels" in data:
        yield "labels of training groups", str(LabelCounts(**data["labels"]["train"]))
    dropped = {reason: count for reason, count in data["dropped"].items() if count}
    yield "dropped", ", ".join(f"{count} `{reason}`" for reason, count in dropped.items()) or "none"


def _public(source: str) -> str:
    """A hub id as it is; of a path the last part alone, as its folders are nobody's business."""
    return Path(source).name if is_local_data(source) or Path(source).exists() else source


def _use(facts: CardFacts, *, adapter: bool) -> str:
    """Lines that load the model, for each library that can."""
    base = facts.hub_base or "<folder of the base model>"
    if not adapter:
        return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this model>")
tokenizer = AutoTokenizer.from_pretrained("<this model>")
```

`vllm serve <this model>` serves it."""
    lines = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "<this model>")
tokenizer = AutoTokenizer.from_pretrained("<this model>")
```
"""
    if facts.settings["peft"]["dora"]:
        return f"{lines}\nvLLM takes no DoRA: `export --merge` makes a whole model for it."
    return f"{lines}\n`vllm serve {base} --enable-lora --lora-modules dpo=<this model>` serves it."


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"
