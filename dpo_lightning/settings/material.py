"""Schemas of what a run works on: the model, its reference, the data and the loss.

A default lives here and nowhere else; the files of ``conf/`` state only what differs from it.
"""

from dataclasses import dataclass, field
from typing import Any

from dpo_lightning.data.dates import DEFAULT_DATE
from dpo_lightning.data.forms import NAMES
from dpo_lightning.objectives.registry import DIVERGENCES
from dpo_lightning.settings.fields import LARGEST_SEED, setting

BASE = "base"
"""As ``reference.adapter``: the model without any adapter."""


@dataclass
class ModelConfig:
    """The policy, and with it the tokenizer."""

    name: str = setting(
        "llama", "Label of the model in the header and in folder names; it chooses nothing."
    )
    pretrained: str | None = setting(
        None,
        "Local folder or hub id of the weights; null is the bundled tiny model, or a random"
        " one with model.config.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of the hub id.")
    tokenizer: str | None = setting(
        None, "Local folder or hub id of the tokenizer; null is the model's own."
    )
    config: str | None = setting(
        None, "Folder, config.json or hub id whose shape a randomly initialised model gets."
    )
    config_overrides: dict[str, Any] = setting(
        {}, "Changes to that shape, such as {num_hidden_layers: 2}."
    )
    dtype: str = setting(
        "float32",
        "Type in which the weights are held; trainer.precision is the type of the computation. "
        "Gradients of bfloat16 weights add up over micro-batches in bfloat16, all others in "
        "float32.",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Compute activations again in the backward pass: less memory, more time; null: only"
        " where they would not fit.",
    )


@dataclass
class PeftConfig:
    """Trained weights: all of them, or LoRA matrices beside frozen ones (PEFT's)."""

    kind: str = setting(
        "none",
        "none trains all weights; lora trains two small matrices beside each linear layer.",
        choices=("none", "lora"),
    )
    r: int = setting(16, "Rank of a LoRA matrix pair.", unit="dimensions", least=1)
    alpha: int = setting(
        32,
        "Scale of the adapter: its product counts alpha / r, or alpha / sqrt(r) with peft.rslora.",
        unit="number",
        least=1,
    )
    dropout: float = setting(
        0.0,
        "Dropout of the adapter's input while training; no other dropout is ever on.",
        unit="share",
        least=0,
        below=1,
    )
    target_modules: list[str] | None = setting(
        None,
        "Names of the modules that get an adapter; null: all linear layers of the decoder "
        "but the head.",
        expected="a list of names, such as [q_proj,v_proj]",
    )
    rslora: bool = setting(False, "Scale by alpha / sqrt(r) (rsLoRA).")
    dora: bool = setting(
        False,
        "Train directions and lengths of the weights apart (DoRA): closer to full training,"
        " and slower.",
    )
    init: str = setting(
        "kaiming",
        "Initial values of the first matrix; the second starts at zero, so that the policy "
        "starts as the base model.",
        expected="one of kaiming, gaussian (pissa, olora, loftq and corda change the base weights, "
        "which are the reference)",
    )
    adapter: str | None = setting(
        None,
        "Folder or hub id of a LoRA adapter to start from, such as one from supervised "
        "fine-tuning.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of that hub id.")
    merge: bool = setting(
        False, "Export a whole model with the adapter added in, beside the adapter."
    )
    quantization: str = setting(
        "none",
        "nf4 holds the frozen weights in 4 bits (QLoRA, by bitsandbytes).",
        choices=("none", "nf4"),
    )


@dataclass
class ReferenceConfig:
    """Source of the reference log-probabilities."""

    kind: str = setting(
        "auto",
        "cached computes each row once ever; live is a frozen copy in memory; none trains "
        "without one; auto is cached where the loss needs a reference, and live where that moves "
        "(reference.sync_every).",
        choices=("auto", "cached", "live", "none"),
    )
    pretrained: str | None = setting(
        None, "Local folder or hub id of the reference; null is the policy as it starts."
    )
    adapter: str | None = setting(
        None,
        "With peft=lora the folder or hub id of another LoRA adapter on the same base "
        "model, or base for the model without any; null is the policy as it starts, with "
        "peft.adapter that adapter, frozen.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of either hub id.")
    sync_every: int | None = setting(
        None,
        "Optimizer steps after which the reference takes over a share of the policy's weights "
        "(TR-DPO), again and again; it is then held in memory. null: it stays as it is.",
        unit="steps",
        least=1,
    )
    sync_alpha: float = setting(
        0.6,
        "Share of the policy in the reference after such an update: alpha * policy + (1 - alpha) * "
        "reference. 1 replaces it.",
        unit="share",
        above=0,
        most=1,
    )
    cache_dir: str | None = setting(
        None,
        "Folder of the cached log-probabilities and of the rows' token ids; null: "
        "$DPO_LIGHTNING_CACHE, or outputs/cache.",
    )


@dataclass
class ControlledConfig:
    """Size of the embedded task, which is generated from the seed."""

    train_groups: int = setting(
        16384, "Rows of the embedded task to train on.", unit="groups", least=1
    )
    eval_groups: int = setting(
        1024, "Rows of the embedded task that are held out.", unit="groups", least=1
    )
    population: bool = setting(
        False,
        "Draw no labels to train on: each pair counts both ways, by the probability of its label.",
    )
    form: str = setting(
        "pairs",
        "Rows of the embedded task: pairs, or single responses with a label (unpaired), for a "
        "loss on such, loss=kto or bco.",
        choices=("pairs", "unpaired"),
    )


@dataclass
class DataConfig:
    """The preferences, how they become tokens, and how many make a step."""

    name: str = setting("controlled", "Label of the data in the header; it chooses nothing.")
    train: Any | None = setting(
        None,
        "A file of rows (jsonl, json, csv, parquet, arrow; .gz too), a folder, a pattern, a hub id,"
        " or a list of these, each by itself or as {path: a.jsonl, weight: 0.5} for half of its "
        "rows; null is the embedded controlled task.",
        expected="a file, a folder, a pattern or a hub id; or a list of these and of "
        "{path: <file>, weight: <share of its rows, above 0 and at most 1>}",
    )
    eval: Any | None = setting(
        None,
        "The same for held-out rows, or sets of them by name, {a: a.jsonl, b: b.jsonl}: "
        "eval/a/loss and so on, and the first set ranks trials; null takes data.eval_split of "
        "data.train, and without it data.eval_fraction.",
        expected="a file, a folder, a pattern or a hub id; or a list of these and of "
        "{path: <file>, weight: <share of its rows, above 0 and at most 1>}; or {<name>: <one of "
        "these>}, names of letters, digits, _ and - that are no metric's",
    )
    train_split: str = setting(
        "train", "Split of the hub set, or of a folder's files, to train on."
    )
    eval_split: str | None = setting(
        None, "Held-out split of data.eval, or of data.train where data.eval is null."
    )
    subset: str | None = setting(None, "Configuration of the hub set, or a part of a folder.")
    revision: str | None = setting(None, "Branch, tag or commit of the hub set.")
    format: str = setting(
        "auto",
        "Form of the rows: auto recognises it by the columns; rows is the project's own; or the "
        "name of a public form, or of a plugin's reader.",
        expected=f"one of {', '.join(NAMES)}, or a reader of a module in plugins",
    )
    columns: dict[str, Any] = setting(
        {},
        "Other names for the fields, such as {prompt: question, chosen: good, rejected: bad}, or "
        "{responses: [a, b], better: winner}; an empty name hides a column.",
    )
    threshold: float | None = setting(
        None,
        "Least rating of an answer that is desirable, such as 4 of 5 stars; lower ones are "
        "undesirable. null: labels are true and false, or 1 and 0 or -1.",
        unit="rating",
    )
    density_ratio: list[float] | None = setting(
        None,
        "Least and largest weight of undesirable answers by their prompts, such as [0.5,10]: each "
        "weighs as many times more as its prompt is likelier among desirable ones; null: prompts "
        "do not count.",
        expected="two numbers, the first above 0 and at most 1, the second at least 1, such as "
        "[0.5,10]",
    )
    ignore_fields: list[str] = setting(
        [],
        "Columns of rows, and keys of messages as messages.<key>, that are left out: neither named "
        "nor refused.",
        expected="a list of names, such as [session_id,messages.name]",
    )
    chat_template: str | None = setting(
        None,
        "A Jinja file or the template itself, for message rows; null is the tokenizer's own.",
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {},
        "Variables of the chat template, such as {enable_thinking: false}; those of a row go over "
        "them.",
    )
    template_date: str = setting(
        DEFAULT_DATE,
        "Day that a chat template is told when it asks for the date, so that tokens do not depend "
        "on the day of the run.",
        expected="a date, such as 2026-01-31",
    )
    batch_size: int = setting(
        32, "Groups (pairs) of one optimizer step, over all devices.", unit="groups", least=1
    )
    micro_batch_tokens: int | None = setting(
        None,
        "Maximum tokens of a micro-batch on one device; null: by its memory. The step does not "
        "depend on it.",
        unit="tokens",
        least=1,
    )
    max_length: int | None = setting(
        None,
        "Longest prompt with one response; null is the model's own limit.",
        unit="tokens",
        least=2,
    )
    truncation: str = setting(
        "drop",
        "Treatment of a group above data.max_length: it is dropped, or the prompt's "
        "beginning or the responses' ends are cut.",
        choices=("drop", "prompt", "response"),
    )
    eval_fraction: float = setting(
        0.1,
        "Share of the prompts that is held out when neither data.eval nor data.eval_split "
        "is given.",
        unit="share",
        least=0,
        below=1,
    )
    split_seed: int = setting(0, "Seed of that split.", unit="seed", least=0, most=LARGEST_SEED)
    on_bad_row: str = setting(
        "stop",
        "A bad row stops the run, or goes to quarantine.jsonl and is counted.",
        choices=("stop", "skip"),
    )
    max_dropped: float = setting(
        0.05,
        "Largest share of the rows that may be dropped, for whatever reason, before the run stops.",
        unit="share",
        least=0,
        most=1,
    )
    overfit_groups: int | None = setting(
        None,
        "Groups to train on over and over, and to evaluate on, the first ones of data.train: a "
        "test that a model learns (debug=overfit), with 20 times the default learning rate of LoRA "
        "or of all weights. null: all.",
        unit="groups",
        least=1,
    )
    num_workers: int = setting(
        0,
        "Processes that prepare batches; 0 prepares them in the run's own.",
        unit="processes",
        least=0,
    )
    controlled: ControlledConfig = field(default_factory=ControlledConfig)


@dataclass
class LossConfig:
    """The objective. Its beta is the experiment's: there is no other.

    The schema that settings are checked against (:func:`loss_schema`) has the options of every
    loss beside these.
    """

    name: str = setting(
        "sigmoid", "Loss function; with several in loss.terms any name of your own."
    )
    terms: dict[str, float] = setting(
        {},
        "Weights of several losses, such as {sigmoid: 0.8, bco_pair: 0.2}; empty: the loss "
        "of loss.name alone.",
    )
    f_divergence: str = setting(
        "reverse_kl",
        "Divergence that holds the policy to the reference; it decides what takes the place"
        " of the log-ratio.",
        choices=DIVERGENCES,
    )
    f_alpha: float = setting(
        0.5, "Order of the alpha divergence: 1 is the reverse KL, 0 the forward KL.", unit="number"
    )
    ld_alpha: float = setting(
        1.0,
        "Weight of the tokens beyond the shorter response of a pair (LD-DPO); 1 counts them whole.",
        unit="weight",
        least=0,
        most=1,
    )
    wpo: bool = setting(False, "Weigh each pair by how likely the policy is to write it (WPO).")
    rpo_alpha: float = setting(
        0.0,
        "Weight of an added negative log-likelihood per token of the chosen response.",
        unit="weight",
        least=0,
    )
    beta_schedule: str = setting(
        "constant",
        "Curve on which beta goes from its value to loss.beta_end over the run.",
        choices=("constant", "linear", "cosine"),
    )
    beta_end: float | None = setting(
        None, "Beta at the end of the run, for loss.beta_schedule.", unit="reward per nat", above=0
    )
    adaptive_beta: float = setting(
        0.0,
        "Strength with which a step's beta follows its margins: beta * (1 + this * (margin - its "
        "mean)); 0 is off.",
        unit="per reward",
        least=0,
    )
    adaptive_momentum: float = setting(
        0.9, "Share of the old mean margin in the next one.", unit="share", least=0, below=1
    )
