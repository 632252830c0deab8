"""Schemas of a run's conduct: optimizer, trainer, strategy, logger, checkpoints, evaluation."""

from dataclasses import dataclass
from typing import Any

from dpo_lightning.settings.fields import setting

_SCALING = (
    *("loss", "margins", "chosen", "rejected", "log_z"),
    *("desirable", "undesirable", "separation", "z0", "delta"),
)


def scales_with_beta(metric: str) -> bool:
    """True for a loss and for what it is made of, by which trials of several betas never compare.

    Args:
        metric: A name as in ``metrics.jsonl``.
    """
    return metric.rpartition("/")[2] in _SCALING


RANKING_METRICS = (
    "controlled/expected_reward",
    "samples/judge",
    "samples/win_rate",
    "eval/rewards/accuracies",
    "eval/label_gain",
)
"""Metrics to rank trials by: none of them scales with beta, and more is better in all."""

JUDGE_KINDS = ("none", "endpoint")
"""Values of ``evaluation.judge`` that are no function's name and no model's."""

RUNG_WARMUPS = 3
"""No rung of a pruned sweep comes before so many times the warm-up: until then a large learning
rate looks bad."""

LOGGERS = ("wandb", "tensorboard", "mlflow", "csv", "none")
"""The choices of ``logger``."""

PRUNE_METRICS = (
    "controlled/expected_reward",
    "samples/judge",
    "eval/fitted_log_loss",
    "eval/rewards/accuracies",
    "eval/label_gain",
)
"""Metrics to prune trials by: none of them scales with beta."""


@dataclass
class OptimizerConfig:
    """The optimizer, clipping and the learning-rate schedule."""

    name: str = setting(
        "adamw",
        "AdamW; adamw_8bit holds both moments in 8 bits; or the name of a plugin's optimizer.",
        expected="one of adamw, adamw_8bit, or an optimizer of a module in plugins",
    )
    stochastic_rounding: bool | None = setting(
        None,
        "Stochastic rounding of bfloat16 weights, so that steps smaller than half of "
        "their last digit survive; null: wherever such weights are trained themselves.",
    )
    lr: float | None = setting(
        None,
        "Peak learning rate; null: by what is trained (bundled model 1e-3, LoRA 5e-6, all "
        "other weights 5e-7).",
        unit="number",
        above=0,
    )
    betas: list[float] = setting(
        [0.9, 0.999],
        "Decay of AdamW's two moments.",
        unit="share",
        expected="two numbers of at least 0 and below 1",
    )
    eps: float = setting(1e-8, "Number added to AdamW's denominator.", unit="number", above=0)
    weight_decay: float = setting(
        0.0, "Decay of the weights, scaled by the learning rate.", unit="number", least=0
    )
    max_grad_norm: float | None = setting(
        1.0,
        "Maximum gradient norm of a step; larger gradients are clipped to it; null: no clipping.",
        unit="norm",
        above=0,
    )
    schedule: str = setting(
        "cosine",
        "Learning-rate schedule after the warm-up; constant stays at the peak.",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = setting(
        0.1,
        "Warm-up to the peak learning rate: below 1 a share of all steps, from 1 on a number of "
        "steps.",
        unit="share or steps",
        expected="a share below 1 or a whole number of steps, not below 0",
    )


@dataclass
class TrainerConfig:
    """Length, devices and precision of the training. The names are those of Lightning's Trainer."""

    accelerator: str = setting(
        "auto",
        "Kind of device to compute on; auto takes a GPU where there is one.",
        choices=("auto", "cpu", "gpu", "cuda", "mps"),
    )
    devices: Any = setting(
        "auto",
        "A count, a list of device numbers, or auto: all there are.",
        unit="devices",
        expected="auto, a count of at least 1, or a list of device numbers such as [0,1]",
    )
    num_nodes: int = setting(1, "Machines that share the run.", unit="machines", least=1)
    precision: str | None = setting(
        None,
        "Type of the computation; null: on a GPU bf16-mixed, or 16-mixed where bfloat16 is only "
        "emulated (T4, V100), else 32-true. 16-mixed scales the loss; bf16-true sets "
        "model.dtype=bfloat16.",
        choices=("32-true", "bf16-mixed", "bf16-true", "16-mixed"),
    )
    max_steps: int | None = setting(
        None,
        "Maximum number of optimizer steps; trainer.max_epochs may end the run earlier. Both null: "
        "one pass.",
        unit="steps",
        least=1,
    )
    max_epochs: int | None = setting(
        None,
        "Maximum number of passes over the data; trainer.max_steps may end the run earlier.",
        unit="passes",
        least=1,
    )
    max_time: str | None = setting(
        None,
        "Maximum wall time of the training, as days:hours:minutes:seconds.",
        unit="DD:HH:MM:SS",
        expected="DD:HH:MM:SS, such as 00:08:00:00, above zero",
    )
    max_skipped_steps: int = setting(
        0,
        "Maximum number of steps to skip because their loss or gradient is not finite.",
        unit="steps",
        least=0,
    )
    log_every_n_steps: int | None = setting(
        None,
        "Steps between two rows of training metrics; null: 1 in a run of up to 200 steps, else 10.",
        unit="steps",
        least=1,
    )
    deterministic: bool = setting(False, "Use deterministic algorithms of torch only, or fail.")
    detect_anomaly: bool = setting(
        False, "Name the operation that made a NaN in the backward pass; slow."
    )
    enable_progress_bar: bool = setting(True, "Show the progress of the training on a terminal.")
    profiler: str | None = setting(
        None,
        "Lightning's profiler, whose tables and traces go to profile/ in the run's folder; null: "
        "none.",
        choices=("simple", "advanced", "pytorch"),
    )
    memory_check: str = setting(
        "stop",
        "Reaction to an estimate of more memory than a GPU has; on a CPU, stop only warns.",
        choices=("stop", "warn", "off"),
    )
    threads: int | None = setting(
        None,
        "CPU threads of torch; null leaves torch's own choice, one for the bundled model.",
        unit="threads",
        least=1,
    )
    callbacks: list[Any] = setting(
        [],
        "Callbacks by name: those that plugins registered, and of Lightning's own "
        "LearningRateMonitor, EarlyStopping and others; {name: {argument: value}} gives arguments.",
    )


@dataclass
class StrategyConfig:
    """Division of a step among several devices."""

    name: str = setting(
        "auto",
        "auto is ddp when there is more than one device; fsdp shares the weights out (FSDP2).",
        choices=("auto", "ddp", "fsdp"),
    )
    sync_gradients: str = setting(
        "auto",
        "With fsdp: reduce gradients once a step, or in every micro-batch, which needs no "
        "memory for whole ones; auto is once a step where the memory allows it.",
        choices=("auto", "step", "micro_batch"),
    )
    find_unused_parameters: bool = setting(
        False, "With ddp: look for weights that a step leaves unused."
    )
    timeout_minutes: float = setting(
        30.0,
        "Timeout of a message between ranks. With fsdp, the time that a rank reads or writes files "
        "does not count.",
        unit="minutes",
        above=0,
    )


@dataclass
class LoggerConfig:
    """Destinations of metrics beside metrics.jsonl, which is always written."""

    name: Any = setting(
        "wandb",
        "Logger, or list of them, beside metrics.jsonl, which is always written.",
        expected=f"one of {', '.join(LOGGERS)}, or a list such as logger=[wandb,tensorboard]",
    )
    project: str | None = setting(
        None,
        "Project in wandb, experiment in mlflow; null: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME of "
        "the environment, or dpo-lightning.",
    )
    entity: str | None = setting(
        None, "User or team in wandb; null: WANDB_ENTITY, or the account's own."
    )
    mode: str = setting(
        "auto",
        "Mode of wandb; auto: WANDB_MODE and WANDB_DISABLED, or online when logged in, else "
        "offline.",
        choices=("auto", "online", "offline", "disabled"),
    )
    tags: list[str] = setting([], "Tags of the run in wandb and mlflow; none: WANDB_TAGS.")
    group: str | None = setting(
        None,
        "Group of the run in wandb, its tag `group` in mlflow; null: WANDB_RUN_GROUP, or the name "
        "of its sweep, if it has one.",
    )
    tracking_uri: str | None = setting(
        None,
        "Store or server of mlflow; null: MLFLOW_TRACKING_URI of the environment, or "
        "sqlite:///outputs/mlflow.db.",
    )
    log_model: bool = setting(
        False, "Keep the exported model with the run, as an artifact of wandb and mlflow."
    )


@dataclass
class CheckpointConfig:
    """Checkpoints, which a run can be resumed from."""

    every_n_steps: int | None = setting(
        500, "Steps between two checkpoints; null: none but the last.", unit="steps", least=1
    )
    keep: int = setting(
        1,
        "Checkpoints that stay: the newest; with checkpoint.monitor the best by it, and the newest "
        "beside them, from which a run goes on.",
        unit="files",
        least=1,
    )
    last: bool = setting(True, "Save one more checkpoint at the end of the run.")
    monitor: str | None = setting(
        None,
        "Metric of the evaluations by which the best checkpoints are kept beside the newest, as "
        "eval/loss, or eval/b/loss of a set in data.eval that ranks no trials; null: the newest "
        "alone.",
        expected="a metric that evaluations measure and that has a better and a worse",
    )
    patience: int | None = setting(
        None,
        "Evaluations without improvement of checkpoint.monitor after which the training ends; "
        "null: it goes on to its last step.",
        unit="evaluations",
        least=1,
    )
    min_delta: float = setting(
        0.0,
        "Change of checkpoint.monitor that checkpoint.patience takes for no improvement yet.",
        unit="of the metric",
        least=0,
    )
    export: str = setting(
        "last",
        "Weights that are evaluated at the end and written to model/: those of the last step, or "
        "of the best by checkpoint.monitor.",
        choices=("last", "best"),
    )


@dataclass
class EvaluationConfig:
    """Held-out metrics and sample answers."""

    every_n_steps: int | None = setting(
        None,
        "Steps between two evaluations; null: a tenth of all steps, or more where "
        "evaluation.max_token_share leaves few rows for each.",
        unit="steps",
        least=1,
    )
    on_start: bool = setting(
        False, "Evaluate before the first step too; its rows have step 0 in metrics.jsonl."
    )
    max_token_share: float | None = setting(
        None,
        "Maximum tokens of all evaluations before the last, as a share of the trained ones: they "
        "see a fixed sample of the held-out rows; null: 0.05 where evaluation.every_n_steps is "
        "null, else no limit.",
        unit="share",
        above=0,
    )
    max_prompts: int | None = setting(
        2000,
        "Maximum number of held-out rows, each a prompt with its responses, of an evaluation: a "
        "fixed sample, which the rows alone decide, of each set of data.eval; null: all.",
        unit="prompts",
        least=1,
    )
    samples: int = setting(
        128,
        "Answers that the trained policy draws to held-out prompts, for its KL divergence "
        "from the reference and for the judge; 0 for none.",
        unit="answers",
        least=0,
    )
    intermediate_samples: int = setting(
        32,
        "Answers that the policy draws at each evaluation before the last: kept in samples.jsonl, "
        "measured, and marked where the judge marks answers by themselves; 0 for none, and none "
        "with evaluation.samples=0.",
        unit="answers",
        least=0,
    )
    max_new_tokens: int | None = setting(
        None,
        "Longest answer; neither KL nor judge see anything beyond it. null: 256, and 512 where "
        "answers are judged; the embedded task has a bound of its own.",
        unit="tokens",
        least=1,
    )
    batch_size: int = setting(
        64,
        "Batch size of drawing answers, and of marking them by a reward model.",
        unit="answers",
        least=1,
    )
    partition_samples: int = setting(
        128,
        "Beginnings of the reference's answers on which the policy's partition function is "
        "estimated, which is 1 for its own reward; 0 for none.",
        unit="answers",
        least=0,
    )
    judge: str | None = setting(
        None,
        "Judge of the answers of policy and reference: a plugin's function, folder or hub id of a "
        "reward model, or endpoint: a model behind an OpenAI-compatible address; null or none: "
        "nobody.",
    )
    judge_url: str | None = setting(
        None,
        "Address of the endpoint, such as http://localhost:8000/v1.",
        expected="an address that begins with http:// or https://, without a query",
    )
    judge_model: str | None = setting(None, "Name of the endpoint's model, as its server has it.")
    judge_form: str = setting(
        "pairs",
        "Question to the endpoint: pairs asks which of two answers is better, in both orders, and "
        "gives a win rate; marks asks for a number for each answer.",
        choices=("pairs", "marks"),
    )
    judge_prompt: str | None = setting(
        None,
        "File with the question to the endpoint, with {prompt}, {first} and {second} in it, or for "
        "marks {prompt} and {answer}; null: one of ours.",
    )
    judge_key_variable: str | None = setting(
        None,
        "Name of the environment variable that holds the endpoint's key, which is read from there "
        "alone; null: none is sent.",
        expected="the name of a variable, such as OPENAI_API_KEY",
    )
    judge_price: list[float] | None = setting(
        None,
        "Price of the endpoint for a million tokens that go in, and for a million that come out; "
        "null: tokens alone are counted.",
        unit="money per million tokens",
        expected="two numbers of at least 0, such as [0.15,0.6]",
    )
    judge_reply_tokens: int = setting(512, "Longest reply of the endpoint.", unit="tokens", least=1)
    judge_timeout: float = setting(
        60.0, "Longest time for one reply of the endpoint.", unit="seconds", above=0
    )
    judge_retries: int = setting(
        5,
        "Retries of a failed request: after a timeout, a broken connection, 429 or 5xx.",
        unit="attempts",
        least=0,
    )
    judge_concurrency: int = setting(
        8, "Concurrent requests to the endpoint.", unit="questions", least=1
    )
    judge_options: dict[str, Any] = setting(
        {},
        "Extra fields of each request's body, such as {top_p: 0.9}; null removes one.",
    )
    scorer: str | None = setting(None, "Old name of evaluation.judge, which it sets.")


@dataclass
class SweepConfig:
    """Settings of a sweep as a whole; hydra.launcher says where and how its trials run."""

    resume: str | None = setting(
        None, "last, or a sweep's folder: runs only the missing trials there."
    )
    metric: str | None = setting(
        None,
        "Metric that the report ranks trials by; null: the first of these that the trials have.",
        choices=RANKING_METRICS,
    )
    prune: str = setting(
        "none",
        "Stop weak trials early: halving keeps a share of them at each rung.",
        choices=("none", "halving"),
    )
    prune_at: list[float] = setting(
        [0.125, 0.25, 0.5],
        "Rungs, as shares of a trial's steps; none comes before three times the warm-up.",
        unit="shares",
        expected="shares above 0 and below 1 in rising order, such as [0.125,0.25,0.5]",
    )
    prune_keep: float = setting(
        0.5,
        "Share of the compared trials that goes on after each rung, at least one.",
        unit="share",
        above=0,
        below=1,
    )
    prune_within: list[str] | None = setting(
        None,
        "Compare only trials that are equal in these settings; [] compares all. null: "
        "[loss,beta,reference] without a judge, so that every loss and beta keeps its best "
        "learning rate, [] with one.",
        expected="a list of settings, such as [loss,beta]",
    )
    prune_metric: str | None = setting(
        None,
        "Metric that rungs compare by. null: the judge's mark (samples/judge) where there is one, "
        "else the log-loss of held-out margins, eval/fitted_log_loss (of single responses "
        "eval/label_gain).",
        expected=f"one of {', '.join(PRUNE_METRICS)}",
    )
    budget: float = setting(
        0.36,
        "Steps of the pruned sweep, as a share of the whole grid's, within which trials stay that "
        "are not significantly worse than the best. Held-out rows that are evaluated at a rung "
        "count as the steps that take as long.",
        unit="share",
        above=0,
        most=1,
    )
    trials: Any | None = setting(
        None,
        "Grids in blocks: a YAML file that holds a list of blocks, or the list; each block is the "
        "product of its own values.",
        expected="a YAML file of blocks, a list of them",
    )
    margin: float | None = setting(
        None,
        "Loss against the best that does not matter, in the ranking metric: the pick is the "
        "smallest KL among trials that surely lose no more. null: 0.02, or 1% of the best's gain.",
        unit="of the metric",
        least=0,
    )
    kl_budget: float | None = setting(
        None,
        "Largest KL from the reference of a trial that the report may pick; null: no limit.",
        unit="nats per answer",
        above=0,
    )


@dataclass
class DebugConfig:
    """Help in finding a fault."""

    traceback: bool = setting(False, "Show the traceback of an error that is otherwise one line.")
