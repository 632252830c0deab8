"""Settings that may not stand together, clause by clause, each beside a right neighbour."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Two lines of settings, in a folder with the files of ``FILES``.

    Attributes:
        refused: Settings that one clause refuses.
        message: A piece of what it says.
        accepted: Their neighbour, which nothing refuses.
        without: A package that is missing while the first line is checked.
    """

    refused: str
    message: str
    accepted: str
    without: str = ""


# What stands in the working folder.
FILES = (
    *("rows.jsonl", "rows.csv", "a.json", "chat.jinja", "model/config.json"),
    *("model/tokenizer.json", "empty/.keep", "base/.keep", "bare/adapter_config.json"),
    *("pickled/adapter_config.json", "pickled/adapter_model.bin"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
)

# Rows and a model of one's own.
OWN = "data.train=rows.jsonl model.pretrained=model"
LORA = "peft.kind=lora"
NF4 = f"{LORA} peft.quantization=nf4"
SFT = "loss.name=sft"
SYNC = "reference.sync_every=64"
HUB = "data.train=org/rows model.pretrained=model"

SOURCES = [
    Row("data.train=https://x/rows.jsonl model.pretrained=model", "addresses are not read", HUB),
    Row(f"{OWN} data.eval=s3://x/rows.jsonl", "data.eval=s3://x", f"{OWN} data.eval=org/rows"),
    Row("data.train=a/b/c model.pretrained=model", "a hub id has the form owner/name", HUB),
    Row("data.train=empty model.pretrained=model", "data.train=empty: the folder has no file", OWN),
    Row("data.train=chat.jinja model.pretrained=model", "suffix .jinja, expected .jsonl, ", OWN),
    Row(
        f"{OWN} data.eval=[a.json,a.json]",
        "a.json is in the list twice",
        f"{OWN} data.eval=[a.json]",
    ),
    Row("data.train=no*.jsonl model.pretrained=model", "no file has a name like that", OWN),
    *(
        # A file of rows in another form is no data set of the hub, there or not.
        Row(f"data.train=nope{suffix} model.pretrained=model", "no such file", HUB)
        for suffix in (
            *(".csv", ".tsv", ".txt", ".gz", ".zst", ".zip"),
            *(".arrow", ".yaml", ".pkl", ".ndjson"),
        )
    ),
    Row("data.train=./nope model.pretrained=model", "data.train=./nope: no such file", OWN),
    Row("data.train=~/nope model.pretrained=model", "data.train=~/nope: no such file", OWN),
    Row("data.train=/nope/x model.pretrained=model", "data.train=/nope/x: no such file", OWN),
    Row("data.train=nope.jsonl model.pretrained=model", "data.train=nope.jsonl: no such file", OWN),
    Row(f"{OWN} data.eval=nope.parquet", "nope.parquet: no such file", f"{OWN} data.eval=a.json"),
    Row(
        "data.train=rows.jsonl model.pretrained=http://x/model",
        "addresses are not loaded; name a folder",
        "data.train=rows.jsonl model.pretrained=org/model",
    ),
    Row("data.train=rows.jsonl model.pretrained=empty", "the folder has no config.json", OWN),
    Row(
        f"{OWN} model.tokenizer=empty",
        "has no tokenizer.json or tokenizer_config.json",
        f"{OWN} model.tokenizer=model",
    ),
    Row("data.train=rows.jsonl model.pretrained=model/config.json", "is a file; name the", OWN),
    Row(
        "data.train=rows.jsonl model.config=rows.jsonl",
        "model.config=rows.jsonl is a file",
        "data.train=rows.jsonl model.config=model/config.json",
    ),
    Row("data.train=rows.jsonl model.pretrained=./nope", "=./nope: no such folder, seen", OWN),
    Row(
        "data.train=rows.jsonl model.pretrained=a/b/c",
        "=a/b/c: no such folder",
        "data.train=rows.jsonl model.pretrained=a/b",
    ),
    Row("reference.pretrained=./nope", "reference.pretrained=./nope", "reference.pretrained=model"),
    Row(
        f"{OWN} data.chat_template=nope.jinja",
        "data.chat_template=nope.jinja: no such file",
        f"{OWN} data.chat_template=chat.jinja",
    ),
    Row(
        f"{OWN} data.chat_template=messages",
        "a template itself has {{ }} or {% %}",
        f"{OWN} data.chat_template='{{{{messages}}}}'",
    ),
    Row("resume=auto", "resume=auto looks in the run's folder", "resume=auto hydra.run.dir=r"),
    Row("resume=s3://x/run", "resume=s3://x/run: addresses are not loaded", "resume=empty"),
    Row("resume=nope.ckpt", "no such checkpoint or run folder", "resume=model/config.json"),
]

MODELS = [
    Row(f"{OWN} model.config=a/b", "model.config=a/b makes a random model and", OWN),
    Row(
        f"{OWN} model.config_overrides.hidden_size=8",
        "model.pretrained=model loads one as it is; leave model.config_overrides out",
        "data.train=rows.jsonl model.config=model model.config_overrides.hidden_size=8",
    ),
    Row(
        "model.config_overrides.hidden_size=8",
        "changes the shape of model.config: set model.config= too",
        "data.train=a/b model.config=model model.config_overrides.hidden_size=8",
    ),
    Row("model.revision=main", "set model.pretrained= too", f"{OWN} model.revision=main"),
    Row("data.train=rows.jsonl", "=rows.jsonl: the bundled model speaks only", OWN),
    Row("data.train=rows.jsonl", "the controlled task", "data.train=rows.jsonl model.config=a/b"),
    Row("model.tokenizer=model", "speaks only through its own", f"{OWN} model.tokenizer=model"),
    Row("data.name=rows", "data=rows needs rows", f"{OWN} data.name=rows"),
    Row("model.pretrained=model", "model.pretrained=model: the controlled task is spoken", OWN),
    Row(
        "model.config=model",
        "model.config=model: the controlled task is spoken only by",
        "data.train=a/b model.config=model",
    ),
    Row("data.threshold=4", "4: the controlled task has no ratings", f"{OWN} data.threshold=4"),
    Row("data.eval=org/rows", "data.eval=org/rows needs training", f"{OWN} data.eval=org/rows"),
    Row(f"{OWN} data.subset=en", "data.subset=en is for hub", f"{HUB} data.subset=en"),
    Row(f"{OWN} data.revision=v", "data.revision=v is for hub", f"{HUB} data.revision=v"),
    Row(f"{OWN} data.eval_split=test", "split=test is for hub", f"{HUB} data.eval_split=test"),
    Row(
        "data.train=[org/rows,rows.jsonl] data.eval_split=test model.pretrained=model",
        "data.eval_split=test is for a hub data set or a folder, and rows.jsonl of data.train is",
        "data.train=[org/rows,rows.jsonl] model.pretrained=model",
    ),
    Row(
        f"{OWN} data.subset=en data.eval=a.json",
        "data.subset=en is for hub data sets, and data.train=rows.jsonl is a file",
        f"{OWN} data.subset=en data.eval=org/rows",
    ),
    Row(
        f"{OWN} data.revision=v data.eval_split=test data.eval=a.json",
        "data.revision=v is for hub",
        f"{OWN} data.eval_split=test data.eval=a.json",
    ),
    Row(
        "trainer.precision=16-mixed model.dtype=bfloat16",
        "computes in float16 beside float32 weights",
        "trainer.precision=bf16-true model.dtype=bfloat16",
    ),
    Row(
        "optimizer.stochastic_rounding=true",
        "rounds bfloat16 weights, and model.dtype=float32",
        "optimizer.stochastic_rounding=true model.dtype=bfloat16",
    ),
    Row(
        "optimizer.stochastic_rounding=true",
        "set model.dtype=bfloat16 too, or leave it out",
        "optimizer.stochastic_rounding=false",
    ),
    Row(
        f"{OWN} evaluation.judge=org/model evaluation.samples=0",
        "evaluation.samples=0 draws no answers to judge",
        f"{OWN} evaluation.judge=org/model evaluation.samples=1",
    ),
    Row("evaluation.judge=org/m evaluation.samples=0", "leave one of", "evaluation.samples=0"),
    Row("evaluation.judge=./nope", "evaluation.judge=./nope", "evaluation.judge=model"),
    Row(
        "evaluation.judge=a/b/c",
        "evaluation.judge=a/b/c",
        "evaluation.judge=a/b/c plugins=[my_scorers]",
    ),
]

ASKED = "evaluation.judge=endpoint evaluation.judge_url=http://localhost:8000/v1"
ENDPOINT = f"{ASKED} evaluation.judge_model=m"

JUDGES = [
    Row(
        "evaluation.scorer=org/a evaluation.judge=org/b",
        "evaluation.scorer=org/a is the old name of evaluation.judge=org/b; give one of the two",
        "evaluation.scorer=org/a evaluation.judge=org/a",
    ),
    Row(
        "evaluation.judge=https://host/v1",
        "addresses are not loaded; to ask a server, use evaluation.judge=endpoint",
        ENDPOINT,
    ),
    Row(
        "evaluation.judge_timeout=5",
        "evaluation.judge_timeout=5 is for an endpoint, and evaluation.judge=none",
        f"{ENDPOINT} evaluation.judge_timeout=5",
    ),
    Row(
        "evaluation.judge=org/m evaluation.judge_form=marks",
        "is for an endpoint, and evaluation.judge=org/m; add evaluation.judge=endpoint",
        "evaluation.judge=org/m evaluation.judge_form=pairs",
    ),
    Row(
        "evaluation.judge=endpoint evaluation.judge_model=m",
        "evaluation.judge=endpoint needs its address",
        ENDPOINT,
    ),
    Row(ASKED, "evaluation.judge=endpoint needs a model: evaluation.judge_model=", ENDPOINT),
    Row(
        f"{ENDPOINT} evaluation.judge_key_variable=A_VARIABLE_OF_NOBODY",
        "the environment has no such variable, or it is empty; set it there",
        f"{ENDPOINT} evaluation.judge_key_variable=PATH",
    ),
    Row(
        "evaluation.judge=endpoint evaluation.judge_url=http://far/v1 evaluation.judge_model=m "
        "evaluation.judge_key_variable=PATH",
        "a key would be sent over an open line; use https",
        "evaluation.judge=endpoint evaluation.judge_url=https://far/v1 evaluation.judge_model=m "
        "evaluation.judge_key_variable=PATH",
    ),
    Row(
        f"{ENDPOINT} evaluation.judge_options.n=2",
        "evaluation.judge_options.n=2: the question itself decides it",
        f"{ENDPOINT} evaluation.judge_options.top_p=0.9",
    ),
    Row(
        f"{ENDPOINT} evaluation.judge_prompt=nope.txt",
        "evaluation.judge_prompt=nope.txt: no such text file",
        ENDPOINT,
    ),
    Row(
        f"{ENDPOINT} evaluation.judge_prompt=rows.csv",
        "it needs {prompt}, {first}, {second} and no other, and has none",
        ENDPOINT,
    ),
]

OBJECTIVES = [
    Row("loss.name=sigmod", "did you mean loss.name=sigmoid?", "loss.name=sigmoid"),
    Row("loss.name=qqq", "loss.name=qqq: must be one of sigmoid, ", "loss.name=x loss.terms.ipo=1"),
    Row("loss.terms.ipo=[1]", "needs a number for each loss", "loss.terms.ipo=0.5"),
    Row("loss.terms.ipo=true", "needs a number for each loss", "loss.terms.ipo=1"),
    Row("loss.terms.ipo=-1", "loss.terms.ipo=-1: must be a finite weight", "loss.terms.ipo=0"),
    Row(f"{SFT} loss.label_smoothing=0.1", "loss.label_smoothing=0.1", "loss.label_smoothing=0.1"),
    Row(f"{SFT} reference.kind=live", "reference=live: loss=sft uses no", "reference.kind=live"),
    Row(f"{SFT} reference.kind=cached", "use reference=auto", f"{SFT} reference.kind=none"),
    Row(
        f"{SFT} reference.pretrained=a/b",
        "reference.pretrained=a/b: loss=sft uses no reference; leave it out",
        "reference.pretrained=a/b",
    ),
    Row(
        "loss.name=bco_pair reference.kind=none",
        "reference=none: loss=bco_pair compares each response with the reference",
        "loss.name=sigmoid reference.kind=none",
    ),
    Row(
        "loss.f_divergence=forward_kl reference.kind=none",
        "reference=none: loss.f_divergence=forward_kl is a distance from the reference",
        "loss.f_divergence=reverse_kl reference.kind=none",
    ),
    Row(
        "reference.sync_alpha=0.3",
        "reference.sync_alpha=0.3: the reference stays as it is; add reference.sync_every=",
        f"{SYNC} reference.sync_alpha=0.3",
    ),
    Row(
        f"{SYNC} {SFT}",
        "reference.sync_every=64: loss=sft uses no reference; leave it out",
        f"{SYNC} loss.name=ipo",
    ),
    Row(
        f"{SYNC} reference.kind=none",
        "reference.sync_every=64 with reference=none: there is nothing to move",
        f"{SYNC} reference.kind=auto",
    ),
    Row(
        f"{SYNC} reference.kind=cached",
        "reference.sync_every=64 with reference=cached: cached log-probs are of the reference as",
        f"{SYNC} reference.kind=live",
    ),
    Row(
        "reference.sync_every=1 reference.sync_alpha=1",
        "the reference would be the policy in each step, so that each log-ratio is 0, the loss",
        "reference.sync_every=2 reference.sync_alpha=1",
    ),
    Row(
        "reference.sync_every=1 reference.sync_alpha=1.0",
        "nothing keeps the policy near any reference; use reference.sync_every=512",
        "reference.sync_every=1 reference.sync_alpha=0.99",
    ),
    Row(
        f"{LORA} {SYNC} reference.pretrained=a/b",
        "moves a copy of the trained adapter, and reference.pretrained=a/b is another start",
        f"{SYNC} reference.pretrained=a/b",
    ),
    Row(
        f"{LORA} {SYNC} reference.adapter=a/b",
        "and reference.adapter=a/b is another start; leave reference.adapter out",
        f"{LORA} {SYNC} peft.adapter=a/b",
    ),
    Row(
        "loss.name=softmax data.controlled.population=true",
        "data.controlled.population=true weighs pairs, which loss=softmax does not compare",
        "loss.name=sigmoid data.controlled.population=true",
    ),
    Row(
        "loss.terms.plackett_luce=1 loss.terms.sigmoid=1 data.controlled.population=true",
        "data.controlled.population=true weighs pairs",
        "loss.name=plackett_luce data.controlled.population=false",
    ),
    Row(
        "loss.name=kto data.controlled.population=true",
        "data.controlled.population=true weighs pairs, which loss=kto does not compare",
        "loss.name=sigmoid data.controlled.population=true",
    ),
    Row(
        "data.controlled.form=unpaired",
        "data.controlled.form=unpaired: rows have one response and a label, and loss=sigmoid",
        "loss.name=bco data.controlled.form=unpaired",
    ),
    Row(
        f"{OWN} loss.name=kto data.controlled.form=unpaired",
        "data.controlled.form=unpaired is of the embedded task, and data.train=",
        f"{OWN} loss.name=kto data.controlled.form=pairs",
    ),
    Row(
        "data.density_ratio=[0.5,10]",
        "data.density_ratio=0.5,10 weighs single responses, and loss=sigmoid compares two",
        "loss.name=bco data.density_ratio=[0.5,10]",
    ),
    Row(
        "loss.name=kto reference.kind=none",
        "reference=none: loss=kto compares each response with the reference",
        "loss.name=kto reference.kind=live",
    ),
    Row(
        "loss.terms.kto=1 loss.terms.sigmoid=0.5",
        "kto is a loss on single responses and stands alone; leave loss.terms.kto out",
        "loss.terms.kto=0.5",
    ),
    Row(
        "loss.name=bco loss.rpo_alpha=0.1",
        "loss.rpo_alpha=0.1 adds the likelihood of the better response of a group",
        "loss.name=bco loss.desirable_weight=0.1",
    ),
    Row(
        "loss.name=kto loss.undesirable_weight=-1",
        "loss.undesirable_weight=-1: must be a number >= 0 for loss=kto",
        "loss.name=kto loss.undesirable_weight=0",
    ),
    Row(
        "loss.name=kto loss.adaptive_beta=0.5",
        "loss.adaptive_beta=0.5 follows the margins of pairs, which loss=kto does not compare",
        "loss.name=sigmoid loss.adaptive_beta=0.5",
    ),
    Row(
        "loss.beta_end=0.05",
        "loss.beta_end=0.05: beta stays as it is; add loss.beta_schedule=linear or cosine",
        "loss.beta_end=0.05 loss.beta_schedule=linear",
    ),
    Row(
        "loss.beta_schedule=cosine",
        "loss.beta_schedule=cosine needs loss.beta_end=",
        "loss.beta_end=0.05 loss.beta_schedule=cosine",
    ),
    Row(
        f"{SFT} loss.adaptive_beta=0.5",
        "loss.adaptive_beta=0.5 follows the margins of pairs, which loss=sft does not compare",
        "loss.terms.sft=1 loss.terms.sigmoid=1 loss.adaptive_beta=0.5",
    ),
    Row("loss.name=softmax loss.adaptive_beta=0.5", "margins of pairs", "loss.adaptive_beta=0.5"),
    Row(
        "reference.kind=none reference.pretrained=a/b",
        "reference.pretrained=a/b with reference=none: use reference=live",
        "reference.kind=live reference.pretrained=a/b",
    ),
    Row(
        "reference.revision=main",
        "reference.revision=main: set reference.pretrained= or",
        "reference.revision=main reference.pretrained=a/b",
    ),
    Row(
        f"{LORA} reference.revision=main reference.adapter=base",
        "whose revision is model.revision; leave it out",
        f"{LORA} reference.revision=main reference.adapter=a/b",
    ),
]

ADAPTERS = [
    Row("peft.r=8", "peft.r=8: peft=none trains all weights; add peft=lora", f"{LORA} peft.r=8"),
    Row("peft.merge=true", "peft.merge=True: peft=none", f"{LORA} peft.merge=true"),
    Row(
        "reference.adapter=base",
        "reference.adapter=base is for LoRA: add peft=lora",
        f"{LORA} reference.adapter=base",
    ),
    *(
        Row(
            f"{LORA} peft.target_modules=[q_proj,{head}]",
            f"{head} is the model's head, which stays frozen",
            f"{LORA} peft.target_modules=[q_proj,{head}_proj]",
        )
        for head in ("lm_head", "model.lm_head", "embed_out", "output_layer")
    ),
    *(
        Row(
            f"{LORA} peft.adapter=a/b peft.{key}={value}",
            "the adapter of peft.adapter=a/b has its own; leave one of the two out",
            f"{LORA} peft.adapter=a/b peft.dropout=0.1",
        )
        for key, value in {
            "r": 8,
            "alpha": 8,
            "target_modules": "[q_proj]",
            "rslora": "true",
            "dora": "true",
            "init": "gaussian",
        }.items()
    ),
    Row(
        f"{LORA} peft.revision=main",
        "peft.revision=main is for a hub id: set peft.adapter= too",
        f"{LORA} peft.revision=main peft.adapter=a/b",
    ),
    Row(f"{LORA} peft.adapter=empty", "has no adapter_config", f"{LORA} peft.adapter=adapter"),
    Row(
        f"{LORA} peft.adapter=pickled",
        "adapter_model.bin is a pickle and is not loaded; needs adapter_model.safetensors",
        f"{LORA} peft.adapter=adapter",
    ),
    Row(f"{LORA} peft.adapter=bare", "peft.adapter=bare: no weights; needs", f"{LORA} peft.r=1"),
    Row(NF4, 'pip install "dpo-lightning[qlora]"', NF4, without="bitsandbytes"),
    Row(NF4, "needs bitsandbytes, which is not installed", LORA, without="bitsandbytes"),
    Row(
        f"{NF4} data.train=rows.jsonl model.config=model",
        "model.config=model has random weights",
        f"{NF4} {OWN}",
    ),
    Row(f"{NF4} peft.merge=true", "peft.merge=true: weights in 4 bits", f"{LORA} peft.merge=true"),
    *(
        Row(
            f"{LORA} reference.adapter='{word}'",
            "the model without any adapter is reference.adapter=base",
            f"{LORA} reference.adapter=base",
        )
        for word in ("none", "null", "off")
    ),
    Row(
        f"{LORA} reference.adapter=a/b reference.pretrained=a/c",
        "is an adapter on the policy's own base model and reference.pretrained=a/c another",
        f"{LORA} reference.pretrained=a/c",
    ),
    Row(
        f"{LORA} reference.adapter=a/b reference.kind=none",
        "reference.adapter=a/b with reference=none: use reference=auto",
        f"{LORA} reference.adapter=a/b reference.kind=live",
    ),
    Row(
        f"{LORA} reference.adapter=base {SFT}",
        "reference.adapter=base: loss=sft uses no reference; leave it out",
        f"{LORA} reference.adapter=base loss.name=ipo",
    ),
    Row(
        f"{LORA} reference.adapter=bare",
        "reference.adapter=bare: no weights",
        f"{LORA} reference.adapter=adapter",
    ),
]

DEVICES = [
    Row(
        "strategy.find_unused_parameters=true",
        "strategy.find_unused_parameters=True: strategy=auto does not use it; add strategy=ddp",
        "strategy.find_unused_parameters=true strategy.name=ddp",
    ),
    Row(
        "strategy.name=fsdp strategy.find_unused_parameters=true",
        "strategy=fsdp does not use it",
        "strategy.name=ddp strategy.timeout_minutes=1",
    ),
    Row(
        "strategy.name=ddp strategy.sync_gradients=micro_batch",
        "strategy.sync_gradients=micro_batch: strategy=ddp does not use it; add strategy=fsdp",
        "strategy.name=fsdp strategy.sync_gradients=micro_batch",
    ),
    Row(
        "strategy.timeout_minutes=1",
        "add strategy=ddp or strategy=fsdp",
        "strategy.name=fsdp strategy.timeout_minutes=1",
    ),
    Row(
        f"strategy.name=fsdp {NF4}",
        "strategy=fsdp: peft.quantization=nf4 is not supported",
        f"strategy.name=ddp {NF4}",
    ),
    Row(
        f"strategy.name=fsdp {NF4}",
        "use strategy=ddp, or peft.quantization=none model.dtype=bfloat16",
        f"strategy.name=fsdp {LORA} model.dtype=bfloat16",
    ),
    Row(
        "strategy.name=fsdp trainer.accelerator=mps",
        "shards need trainer.accelerator=gpu or cpu, not mps",
        "strategy.name=fsdp trainer.accelerator=gpu",
    ),
    Row("strategy.name=fsdp trainer.accelerator=mps", "not mps", "trainer.accelerator=mps"),
    Row(
        "trainer.accelerator=cpu trainer.devices=[0,1]",
        "processes on the CPU have no numbers; use trainer.devices=2",
        "trainer.accelerator=cpu trainer.devices=2",
    ),
    Row(
        "trainer.accelerator=cpu trainer.devices=[3]",
        "use trainer.devices=1",
        "trainer.accelerator=gpu trainer.devices=[3]",
    ),
    *(
        Row(
            f"loss.name={name} trainer.devices=2",
            f"trainer.devices=2: loss={name} compares all pairs of a step",
            f"loss.name={name} trainer.devices=1",
        )
        for name in ("aot", "aot_unpaired", "kto_pair")
    ),
    Row(
        "loss.terms.aot=1 loss.terms.kto_pair=1 trainer.num_nodes=2",
        "trainer.num_nodes=2: loss=aot,kto_pair compares all pairs",
        "loss.name=sigmoid trainer.num_nodes=2",
    ),
    Row(
        "loss.name=aot trainer.devices=[0,1] trainer.num_nodes=2",
        "trainer.devices=[0, 1] trainer.num_nodes=2: loss=aot",
        "loss.name=aot trainer.devices=[0]",
    ),
    Row(
        "-m trainer.devices=2",
        "trainer.devices=2: the trials of hydra/launcher=basic share one process",
        "trainer.devices=2",
    ),
    Row("-m trainer.devices=[0,1]", "use hydra/launcher=devices", "-m trainer.devices=[0]"),
    Row("-m trainer.num_nodes=2", "trainer.num_nodes=2: the trials", "-m trainer.devices=1"),
]

HALVING = "sweep.prune=halving"
PRUNING = [
    Row(
        "sweep.prune_keep=0.3",
        "sweep.prune_keep=0.3: sweep.prune=none prunes nothing; add sweep.prune=halving",
        f"{HALVING} sweep.prune_keep=0.3",
    ),
    Row("sweep.budget=0.5", "sweep.prune=none prunes nothing", f"{HALVING} sweep.budget=0.5"),
    *(
        Row(
            f"{HALVING} sweep.prune_metric={name}",
            f"sweep.prune_metric={name}: it scales with beta, so it does not compare trials",
            f"{HALVING} sweep.prune_metric=eval/fitted_log_loss",
        )
        for name in ("eval/loss", "train/loss", "eval/rewards/margins", "eval/logratios/margins")
    ),
    Row(
        f"loss.name=kto {HALVING} sweep.prune_metric=eval/logratios/separation",
        "it does not compare trials; use sweep.prune_metric=eval/label_gain",
        f"loss.name=kto {HALVING} sweep.prune_metric=eval/label_gain",
    ),
    Row(
        f"loss.name=kto {HALVING} sweep.prune_metric=eval/rewards/accuracies",
        "is not measured with loss=kto; use sweep.prune_metric=eval/label_gain, or leave it out",
        f"loss.name=kto {HALVING}",
    ),
    Row(
        f"{HALVING} sweep.prune_metric=eval/label_gain",
        "is not measured with loss=sigmoid; use sweep.prune_metric=eval/fitted_log_loss",
        f"{HALVING} sweep.prune_metric=eval/rewards/accuracies",
    ),
    Row(
        f"{HALVING} sweep.prune_metric=samples/judge",
        "is a judge's mark, and evaluation.judge names none; use sweep.prune_metric=",
        f"{HALVING} sweep.prune_metric=eval/rewards/accuracies",
    ),
    Row(
        f"{HALVING} {ENDPOINT} sweep.prune_metric=samples/judge",
        "is a mark of each answer, and evaluation.judge_form=pairs compares two",
        f"{HALVING} {ENDPOINT} sweep.prune_metric=samples/judge evaluation.judge_form=marks",
    ),
    Row(
        f"{OWN} {HALVING} sweep.prune_metric=controlled/expected_reward",
        "exists for the embedded task only",
        f"{HALVING} sweep.prune_metric=controlled/expected_reward",
    ),
    Row(
        f"{OWN} {HALVING} data.eval_fraction=0",
        "needs held-out rows: set data.eval=, or a data.eval_fraction= > 0",
        f"{OWN} {HALVING} data.eval_fraction=0 data.eval=a.json",
    ),
    Row(
        f"{HALVING} optimizer.warmup=0.4",
        "no rung of a pruned sweep comes before 3 times the warm-up",
        f"{HALVING} optimizer.warmup=0.3",
    ),
]

MONITOR = "checkpoint.monitor=eval/loss"
SETS = 'data.eval={"a":a.json,"b":rows.jsonl}'
SELECTION = [
    Row(
        "loss.name=kto checkpoint.monitor=eval/rewards/accuracies",
        "is not measured with loss=kto, a loss on single responses; use checkpoint.monitor=eval/",
        "loss.name=kto checkpoint.monitor=eval/label_gain",
    ),
    Row(
        "checkpoint.monitor=eval/label_gain",
        "is not measured with loss=sigmoid, a loss on pairs; use checkpoint.monitor=eval/loss",
        "checkpoint.monitor=eval/rewards/accuracies",
    ),
    Row(
        "checkpoint.patience=3",
        "checkpoint.patience=3: nothing says which checkpoint is better; add checkpoint.monitor=",
        f"{MONITOR} checkpoint.patience=3",
    ),
    Row("checkpoint.export=best", "nothing says which", f"{MONITOR} checkpoint.export=best"),
    Row(
        f"{MONITOR} checkpoint.min_delta=0.1",
        "checkpoint.min_delta=0.1 is for checkpoint.patience, which is null",
        f"{MONITOR} checkpoint.min_delta=0.1 checkpoint.patience=2",
    ),
    Row(
        f"{HALVING} {MONITOR} checkpoint.patience=3",
        "sweep.prune=halving stops trials already",
        f"{HALVING} {MONITOR} checkpoint.export=best",
    ),
    Row(
        "checkpoint.monitor=eval_loss",
        "unknown metric; did you mean checkpoint.monitor=eval/loss? ",
        MONITOR,
    ),
    *(
        Row(f"checkpoint.monitor={name}", "neither more nor less of it is better", MONITOR)
        for name in ("eval/rewards/chosen", "controlled/kl_policy_reference", "samples/kl")
    ),
    Row(
        "checkpoint.monitor=train/rewards/accuracies",
        "is of the rows that are trained on; use checkpoint.monitor=eval/rewards/accuracies",
        "checkpoint.monitor=eval/rewards/accuracies",
    ),
    Row(
        f"{OWN} checkpoint.monitor=samples/judge",
        "checkpoint.monitor=samples/judge needs a judge that marks answers",
        f"{OWN} checkpoint.monitor=samples/judge evaluation.judge=endpoint "
        "evaluation.judge_model=m evaluation.judge_form=marks "
        "evaluation.judge_url=http://localhost:8000/v1",
    ),
    Row(
        f"{OWN} {SETS} checkpoint.monitor=eval/c/loss",
        "there is no held-out set c (there are: a, b); use checkpoint.monitor=eval/loss",
        f"{OWN} {SETS} checkpoint.monitor=eval/b/loss",
    ),
    Row(
        f"{OWN} checkpoint.monitor=controlled/expected_reward",
        "checkpoint.monitor=controlled/expected_reward exists for the embedded task only",
        "checkpoint.monitor=controlled/expected_reward",
    ),
    Row(
        "checkpoint.monitor=samples/win_rate",
        "is not measured before the end of a run; use checkpoint.monitor=eval/loss",
        "checkpoint.monitor=controlled/gain_ratio",
    ),
    Row(
        "checkpoint.monitor=samples/judge",
        "checkpoint.monitor=samples/judge needs a judge that marks answers, and answers to mark: ",
        "checkpoint.monitor=samples/judge evaluation.judge=model",
    ),
    Row(
        f"{OWN} {MONITOR} data.eval_fraction=0",
        "checkpoint.monitor=eval/loss is measured on held-out rows: set data.eval=",
        f"{OWN} {MONITOR} data.eval_fraction=0 data.eval=a.json",
    ),
    Row(
        "evaluation.samples=0 evaluation.intermediate_samples=5",
        "evaluation.intermediate_samples=5: evaluation.samples=0 draws no answers",
        "evaluation.samples=9 evaluation.intermediate_samples=5",
    ),
    Row(
        f'{OWN} data.eval={{"a":a.json,"b":nope.json}}', "data.eval.b=nope.json: no such file", OWN
    ),
]

ROUNDS = [
    Row(
        "rounds.num_generations=8",
        "rounds.num_generations=8: rounds.count=0 draws nothing; add rounds.count=3",
        "rounds.num_generations=8 rounds.count=3",
    ),
    Row(
        f"{OWN} rounds.count=3",
        "rounds.count=3 needs a judge that marks the answers",
        f"{OWN} rounds.count=3 evaluation.judge=org/m",
    ),
    Row(
        f"{OWN} rounds.count=3 rounds.groups=ranking {ENDPOINT}",
        "evaluation.judge_form=pairs compares two answers",
        f"{OWN} rounds.count=3 rounds.groups=ranking {ENDPOINT} evaluation.judge_form=marks",
    ),
    Row(
        "rounds.count=3 trainer.max_steps=2",
        "rounds.count=3: trainer.max_steps=2 has no step for each round",
        "rounds.count=3 trainer.max_steps=3",
    ),
    Row(
        "rounds.count=3 rounds.steps=4 trainer.max_steps=10",
        "are 12 steps; leave trainer.max_steps out",
        "rounds.count=3 rounds.steps=4 trainer.max_steps=12",
    ),
    Row(
        "rounds.count=3 rounds.steps=4 trainer.max_epochs=1",
        "trainer.max_epochs=1: rounds.count=3 x rounds.steps=4 say how long the run is",
        "rounds.count=3 trainer.max_epochs=1",
    ),
    Row(
        "rounds.count=3 rounds.reference=previous reference.kind=live",
        "rounds.reference=previous: its log-probabilities are computed by the policy itself",
        "rounds.count=3 rounds.reference=previous reference.kind=cached",
    ),
    Row(
        f"rounds.count=3 rounds.reference=previous {SFT}",
        "rounds.reference=previous: loss=sft with reference=auto uses no reference",
        f"rounds.count=3 {SFT}",
    ),
    Row(
        "rounds.count=3 strategy.name=fsdp",
        "rounds.count=3: strategy=fsdp shares the weights out",
        "rounds.count=3 strategy.name=ddp",
    ),
    Row(
        "rounds.count=3 generation.backend=http://localhost:8000/v1 generation.model=m",
        "answers with weights that it has loaded",
        "rounds.count=3 generation.backend=vllm",
    ),
    Row(
        "rounds.count=3 data.overfit_groups=8",
        "data.overfit_groups=8 trains on a few given rows",
        "rounds.count=3",
    ),
    Row(
        "rounds.count=3 data.controlled.population=true",
        "data.controlled.population=true weighs the given pairs",
        "rounds.count=3",
    ),
    Row(
        "rounds.count=3 reference.sync_every=8",
        "reference.sync_every=8 moves the reference by steps",
        "rounds.count=3 rounds.reference=previous",
    ),
    Row(
        "rounds.count=3 loss.name=kto",
        "loss=kto learns from labels of single responses",
        "rounds.count=3",
    ),
    Row(
        "rounds.count=3 sweep.prune=halving",
        "sweep.prune=halving compares trials on the way",
        "sweep.prune=halving",
    ),
]

ROWS = [
    *(*SOURCES, *MODELS, *JUDGES, *OBJECTIVES, *ADAPTERS, *DEVICES, *PRUNING, *SELECTION, *ROUNDS),
]
