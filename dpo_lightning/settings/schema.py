"""The settings of an experiment as closed dataclass schemas.

A default lives here and nowhere else; the files of ``conf/`` state only what differs from it. What
a single value may be stands beside its default (``_setting``); what values may not be together is
in :mod:`dpo_lightning.settings.validation`. Nothing here imports torch: a wrong key is answered
before it.
"""

import functools
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.objectives.objective import known_losses, merged_options
from dpo_lightning.objectives.registry import DIVERGENCES, PAIRWISE_LOSSES

FREE_FORM = ("model.config_overrides", "data.columns", "loss.terms")
"""Mappings whose keys belong to the user: any key may be set in them."""

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package."""

IN_CLONE = not (PACKAGE / "conf").is_dir()
"""Whether this is a clone, where ``conf/`` and ``train.py`` stand beside the package."""

CONF = (PACKAGE.parent if IN_CLONE else PACKAGE) / "conf"
"""The config files; an installed wheel has them inside the package."""

RANKING_METRICS = (
    "controlled/expected_reward",
    "samples/score",
    "samples/win_rate",
    "eval/rewards/accuracies",
)
"""By what trials may be ranked: none of them scales with beta, and more is better in all."""

BASE = "base"
"""As ``reference.adapter``: the model without any adapter."""

LARGEST_SEED = 2**32 - 1


def _setting(default: Any, **rule: Any) -> Any:
    """A field with the rule that its value must meet.

    Args:
        default: The value when nothing is set.
        **rule: ``choices``; the bounds ``least``, ``above``, ``most``, ``below``; or ``expected``,
            a description of what a check in ``validation.py`` accepts.
    """
    return field(default=default, metadata=rule)


@dataclass
class ModelConfig:
    """The policy, and with it the tokenizer."""

    # Shown in the header and in a run's folder name; it chooses nothing.
    name: str = "llama"
    # A local folder or a hub id; null is the bundled tiny model (or a random one, see config).
    pretrained: str | None = None
    # Branch, tag or commit of a hub id.
    revision: str | None = None
    # A local folder or a hub id; null is the model's own.
    tokenizer: str | None = None
    # A folder, a config.json or a hub id: a randomly initialised model of that shape.
    config: str | None = None
    # Changes to that shape, such as {num_hidden_layers: 2}.
    config_overrides: dict[str, Any] = field(default_factory=dict)
    # What the weights are held in; trainer.precision is what is computed in.
    dtype: str = _setting("float32", choices=("float32", "bfloat16"))
    # Less memory for more time: activations are computed again in the backward pass; null: only
    # where they would not fit.
    gradient_checkpointing: bool | None = None


@dataclass
class ControlledConfig:
    """Size of the embedded task, which is generated from the seed."""

    train_groups: int = _setting(16384, least=1)
    eval_groups: int = _setting(1024, least=1)
    # Draw no labels to train on: each pair counts both ways, by the probability of its label.
    population: bool = False


@dataclass
class DataConfig:
    """The preferences, how they become tokens, and how many make a step."""

    # Shown in the header; it chooses nothing.
    name: str = "controlled"
    # A jsonl, json or parquet file or a hub id; null is the embedded controlled task.
    train: str | None = None
    # The same for held-out rows; null takes eval_split of train, and without it eval_fraction.
    eval: str | None = None
    train_split: str = "train"
    # The split of eval, or of train where eval is null.
    eval_split: str | None = None
    # Configuration and branch, tag or commit of a hub set.
    subset: str | None = None
    revision: str | None = None
    # auto recognises the row forms by their fields; sharegpt is the conversations form.
    format: str = _setting("auto", choices=("auto", "rows", "sharegpt"))
    # Other names for the fields: {prompt: question, chosen: good, rejected: bad}.
    columns: dict[str, str] = field(default_factory=dict)
    # A Jinja file or the template itself, for message rows and a tokenizer without a template.
    chat_template: str | None = None
    # Groups (pairs) of one optimizer step, over all devices.
    batch_size: int = _setting(32, least=1)
    # Tokens that one device holds at once; null: by its memory. The step does not depend on it.
    micro_batch_tokens: int | None = _setting(None, least=1)
    # Tokens of the prompt and one response; null is the model's own limit.
    max_length: int | None = _setting(None, least=2)
    # What gives way above max_length: the group, the prompt's beginning, or the responses' ends.
    truncation: str = _setting("drop", choices=("drop", "prompt", "response"))
    # Share of the prompts that is held out when neither eval nor eval_split is given.
    eval_fraction: float = _setting(0.1, least=0, below=1)
    split_seed: int = _setting(0, least=0, most=LARGEST_SEED)
    # A bad row stops the run, or goes to quarantine.jsonl and is counted.
    on_bad_row: str = _setting("stop", choices=("stop", "skip"))
    # Share of the rows that may be dropped, for whatever reason, before the run stops.
    max_dropped: float = _setting(0.05, least=0, most=1)
    num_workers: int = _setting(0, least=0)
    controlled: ControlledConfig = field(default_factory=ControlledConfig)


@dataclass
class LossConfig:
    """The objective. Its beta is the experiment's: there is no other.

    The schema that settings are checked against (:func:`loss_schema`) has the options of every
    loss beside these.
    """

    # A loss; or any name where terms says what is added up.
    name: str = "sigmoid"
    # Weights of several losses, {sigmoid: 0.8, bco_pair: 0.2}; empty: the one of that name.
    terms: dict[str, float] = field(default_factory=dict)
    # What holds the policy to the reference, and so what takes the place of the log-ratio.
    f_divergence: str = _setting("reverse_kl", choices=DIVERGENCES)
    # Order of the alpha divergence: 1 is the reverse KL, 0 the forward KL.
    f_alpha: float = 0.5
    # Weight of the tokens beyond the shorter response of a pair (LD-DPO); 1 counts them whole.
    ld_alpha: float = _setting(1.0, least=0, most=1)
    # Weigh each pair by how likely the policy is to write it (WPO).
    wpo: bool = False
    # Weight of an added negative log-likelihood per token of the chosen response.
    rpo_alpha: float = _setting(0.0, least=0)
    # How beta goes from its value to beta_end over the run.
    beta_schedule: str = _setting("constant", choices=("constant", "linear", "cosine"))
    beta_end: float | None = _setting(None, above=0)
    # By how much a step's beta follows its margins, (1 + this * (margin - its mean)); 0 for none.
    adaptive_beta: float = _setting(0.0, least=0)
    # Share of the old mean in the next one.
    adaptive_momentum: float = _setting(0.9, least=0, below=1)


@dataclass
class PeftConfig:
    """What is trained: all weights, or LoRA matrices beside frozen ones (PEFT's)."""

    # none trains all weights; lora two small matrices beside each linear layer.
    kind: str = _setting("none", choices=("none", "lora"))
    # Rank of their product, and what it is scaled by: alpha / r, or alpha / sqrt(r) with rslora.
    r: int = _setting(16, least=1)
    alpha: int = _setting(32, least=1)
    # Of the matrices' input while training; no other dropout is ever on.
    dropout: float = _setting(0.0, least=0, below=1)
    # Names of modules; null: all linear layers of the decoder, which are all but the head.
    target_modules: list[str] | None = field(
        default=None, metadata={"expected": "a list of names, such as [q_proj,v_proj]"}
    )
    rslora: bool = False
    # Directions and lengths of the weights apart: closer to full training, and slower.
    dora: bool = False
    # Of the first matrix; the second starts at zero, so that the policy starts as the base model.
    init: str = _setting(
        "kaiming",
        expected="one of kaiming, gaussian (pissa, olora, loftq and corda change the base weights, "
        "which are the reference)",
    )
    # A folder or hub id of a LoRA adapter to start from, such as one from supervised fine-tuning.
    adapter: str | None = None
    # Branch, tag or commit of that hub id.
    revision: str | None = None
    # Beside the adapter, export a whole model with the adapter added in.
    merge: bool = False
    # nf4 holds the frozen weights in 4 bits (QLoRA, by bitsandbytes).
    quantization: str = _setting("none", choices=("none", "nf4"))


@dataclass
class ReferenceConfig:
    """Where the reference log-probabilities come from."""

    # cached computes each row once ever; live is a frozen copy in memory; none trains without one;
    # auto is cached where the loss needs a reference.
    kind: str = _setting("auto", choices=("auto", "cached", "live", "none"))
    # A local folder or a hub id; null is the policy as it starts.
    pretrained: str | None = None
    # With peft=lora a folder or hub id of another LoRA adapter on the same base model, or base: the
    # model without any; null is the policy as it starts, with peft.adapter that adapter, frozen.
    adapter: str | None = None
    # Branch, tag or commit of either's hub id.
    revision: str | None = None
    # Where they are kept, and the token ids of rows; null: $DPO_LIGHTNING_CACHE, or outputs/cache.
    cache_dir: str | None = None


@dataclass
class OptimizerConfig:
    """AdamW, clipping and the learning-rate schedule."""

    # adamw_8bit holds both moments in 8 bits.
    name: str = _setting("adamw", choices=("adamw", "adamw_8bit"))
    # Round bfloat16 weights up or down by chance, so that steps smaller than half of their last
    # digit are not lost; null: wherever such weights are trained themselves.
    stochastic_rounding: bool | None = None
    # null: by what is trained (bundled model 1e-3, LoRA 5e-6, all other weights 5e-7).
    lr: float | None = _setting(None, above=0)
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.999],
        metadata={"expected": "two numbers of at least 0 and below 1"},
    )
    eps: float = _setting(1e-8, above=0)
    weight_decay: float = _setting(0.0, least=0)
    # Largest norm of a step's gradient; null does not clip.
    max_grad_norm: float | None = _setting(1.0, above=0)
    schedule: str = _setting("cosine", choices=("cosine", "linear", "constant"))
    # Below 1 a share of all steps, from 1 on a number of steps.
    warmup: float = _setting(
        0.1, expected="a share below 1 or a whole number of steps, not below 0"
    )


@dataclass
class TrainerConfig:
    """How long, on what, and in which precision. The names are those of Lightning's Trainer."""

    accelerator: str = _setting("auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    # A count, a list of device numbers, or auto: all there are.
    devices: Any = field(
        default="auto",
        metadata={
            "expected": "auto, a count of at least 1, or a list of device numbers such as [0,1]"
        },
    )
    num_nodes: int = _setting(1, least=1)
    # null: bf16-mixed on a GPU that has it, else 32-true.
    precision: str | None = _setting(None, choices=("32-true", "bf16-mixed"))
    # Optimizer steps and passes over the data, whichever ends first; both null: one pass.
    max_steps: int | None = _setting(None, least=1)
    max_epochs: int | None = _setting(None, least=1)
    # Wall time of the training, as days:hours:minutes:seconds.
    max_time: str | None = _setting(None, expected="DD:HH:MM:SS, such as 00:08:00:00, above zero")
    # Steps that may be passed over in a run because their loss or gradient is not finite.
    max_skipped_steps: int = _setting(0, least=0)
    # null: every step up to 200 of them, else every tenth.
    log_every_n_steps: int | None = _setting(None, least=1)
    deterministic: bool = False
    # Names the operation that made a NaN in the backward pass; slow.
    detect_anomaly: bool = False
    enable_progress_bar: bool = True
    profiler: str | None = _setting(None, choices=("simple", "advanced", "pytorch"))
    # What happens where the estimate is more than a GPU has; on a CPU stop only warns, too.
    memory_check: str = _setting("stop", choices=("stop", "warn", "off"))
    # CPU threads of torch; null leaves torch's own choice (one for the bundled model).
    threads: int | None = _setting(None, least=1)
    # Callbacks that plugins registered, by name.
    callbacks: list[str] = field(default_factory=list)


@dataclass
class StrategyConfig:
    """How several devices share a step."""

    # auto is ddp when there is more than one device; fsdp shares the weights out (FSDP2).
    name: str = _setting("auto", choices=("auto", "ddp", "fsdp"))
    # For fsdp: reduce gradients once a step, or in every micro-batch, which holds no whole ones.
    sync_gradients: str = _setting("step", choices=("step", "micro_batch"))
    # For models of which a step leaves weights unused.
    find_unused_parameters: bool = False
    # How long a rank waits for the others.
    timeout_minutes: float = _setting(30.0, above=0)


@dataclass
class LoggerConfig:
    """Where metrics go beside metrics.jsonl, which is always written."""

    name: str = _setting("wandb", choices=("wandb", "csv", "none"))
    # The rest is for wandb.
    project: str = "dpo-lightning"
    entity: str | None = None
    # auto is online when logged in, else offline.
    mode: str = _setting("auto", choices=("auto", "online", "offline", "disabled"))
    tags: list[str] = field(default_factory=list)
    group: str | None = None


@dataclass
class CheckpointConfig:
    """What can be resumed from."""

    # null: none but the last.
    every_n_steps: int | None = _setting(500, least=1)
    # How many of those stay; older ones go.
    keep: int = _setting(1, least=1)
    # One more at the end of the run.
    last: bool = True


@dataclass
class EvaluationConfig:
    """Held-out metrics and sample answers."""

    # null: at the end of each pass over the data.
    every_n_steps: int | None = _setting(None, least=1)
    # Answers that the trained policy draws to prompts of the evaluation set, by which its KL
    # divergence from the reference is estimated and which the scorer judges; 0 for none.
    samples: int = _setting(128, least=0)
    # Longest answer; beyond it neither KL nor score see anything.
    max_new_tokens: int = _setting(64, least=1)
    # Answers that are drawn or scored at once.
    batch_size: int = _setting(64, least=1)
    # Beginnings of the reference's answers on which the policy's partition function is estimated,
    # which is 1 for its own reward; 0 for none.
    partition_samples: int = _setting(128, least=0)
    # Judges the answers of policy and reference: a folder or hub id of a reward model (sequence
    # classification), or the name of a function of one of the plugins.
    scorer: str | None = None


@dataclass
class SweepConfig:
    """What concerns a sweep as a whole; hydra.launcher says where and how its trials run."""

    # last, or a sweep's folder: does there what is missing.
    resume: str | None = None
    # What its report ranks by; null: the first of these that the trials have.
    metric: str | None = _setting(None, choices=RANKING_METRICS)


@dataclass
class DebugConfig:
    """Help in finding a fault."""

    # Show the traceback of an error that is otherwise one line.
    traceback: bool = False


@dataclass
class Config:
    """One experiment."""

    # Strength of the tie to the reference; every loss takes it from here.
    beta: float = _setting(0.1, above=0)
    seed: int = _setting(1, least=0, most=LARGEST_SEED)
    # Name of the run's folder and of the run in wandb; null: model, loss and beta.
    name: str | None = None
    # A checkpoint, a run's folder, or auto: the newest one in an explicit hydra.run.dir.
    resume: str | None = None
    # Let a resumed run have another beta, loss, seed, model or data than its checkpoint.
    resume_changed: bool = False
    # Modules of your own, by their import names; they may register what the settings then name.
    plugins: list[str] = field(
        default_factory=list, metadata={"expected": "a list of import names, such as [my_scorers]"}
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # With the options of every loss.
    loss: LossConfig = field(default_factory=lambda: loss_schema()())
    peft: PeftConfig = field(default_factory=PeftConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def loss_schema() -> type[LossConfig]:
    """The schema of the ``loss`` group: with the options of every loss that there is by now."""
    return _loss_schema(known_losses())


@functools.cache
def _loss_schema(names: tuple[str, ...]) -> type[LossConfig]:
    options = merged_options(PAIRWISE_LOSSES[name] for name in names if name in PAIRWISE_LOSSES)
    own = {item.name for item in fields(LossConfig)}
    # Bounds are each loss's own; combinations.py has them.
    return make_dataclass(
        "LossConfig",
        [
            (name, option.kind, field(default=option.default))
            for name, option in options.items()
            if name not in own
        ],
        bases=(LossConfig,),
    )
