"""Names of other programs: each is answered with settings that exist, or with the reason."""

import pytest

from dpo_lightning.objectives.objective import known_losses
from dpo_lightning.settings.foreign_answers import Answer
from dpo_lightning.settings.foreign_keys import KEYS
from dpo_lightning.settings.foreign_values import VALUES, near_miss, plain, renamed_loss
from dpo_lightning.settings.keys import is_known, settings
from dpo_lightning.settings.messages import unknown_key, unknown_option, wrong_value
from tests.support.foreign_programs import FIRST_REPOSITORY, LIGHTNING, TRANSFORMERS, TRL
from tests.support.foreign_tables import check_settings

# The same word for the same thing, typed at the top as there; a group's choices answer for it.
OURS = {"seed", "beta", "debug", "model", "peft_config", "trainer", "optimizer", "logger"}
OURS |= {"loss.name", "loss.label_smoothing"}


def test_the_lists_of_other_programs_are_whole() -> None:
    """They are read off sources: nothing else would notice a list that came out empty."""
    assert {"loss_type", "precompute_ref_log_probs", "use_weighting", "ref_model"} <= {*TRL}
    assert {"lora_r", "dataset_name", "use_peft", "padding_free"} <= {*TRL}
    assert {"learning_rate", "save_steps", "report_to", "bf16", "warmup_steps"} <= {*TRANSFORMERS}
    assert {"val_check_interval", "strategy", "plugins", "fast_dev_run"} <= {*LIGHTNING}
    assert (len(TRL) > 50, len(TRANSFORMERS) > 100, len(LIGHTNING) > 35) == (True, True, True)


@pytest.mark.parametrize("key", sorted({*TRL, *TRANSFORMERS, *FIRST_REPOSITORY} - {"args"}))
def test_every_key_of_theirs_is_ours_or_in_the_table(key: str) -> None:
    if is_known(key):
        assert key in OURS
        return
    answer = unknown_key(key)
    in_table = key in KEYS or key.rpartition(".")[2] in KEYS
    # A key that goes by the same name below one section of ours needs no entry.
    leaf = key.rpartition(".")[2]
    same = [name for name in settings() if name.rpartition(".")[2] == leaf]
    assert in_table or f"did you mean `{same[0]}`?" in answer, answer


@pytest.mark.parametrize("name", LIGHTNING)
def test_every_argument_of_lightnings_trainer_is_a_key_or_in_the_table(name: str) -> None:
    """The names of the group ``trainer`` are Lightning's, where it has them."""
    key = f"trainer.{name}"
    assert is_known(key) or key in KEYS or name in KEYS


ANSWERS = [
    *KEYS.items(),
    *((f"{k}={v}", answer) for k, found in VALUES.items() for v, answer in found.items()),
]


@pytest.mark.parametrize(("name", "answer"), ANSWERS, ids=[name for name, _ in ANSWERS])
def test_an_answer_names_settings_that_there_are(name: str, answer: Answer) -> None:
    assert answer.use or answer.why
    for text in (answer.use, answer.why, *answer.values.values()):
        check_settings(text)
    assert not answer.carries or "<" in answer.use


def test_values_are_written_as_they_are_looked_up() -> None:
    for group, found in VALUES.items():
        assert is_known(group)
        assert [plain(value) for value in found] == list(found)


def test_no_entry_hides_a_loss_or_a_key_of_ours() -> None:
    assert not {*known_losses()} & {*VALUES["loss"]}
    assert not {*settings()} & {key for key in KEYS if "." in key}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lr", 2e-5, "use optimizer.lr=2e-05"),
        ("learning_rate", "fast", "use optimizer.lr=<rate>"),
        ("loss_type", "dpo", "use loss=sigmoid"),
        ("loss_type", "robust", "use loss=robust"),
        ("loss_type", "nonesuch", "use loss=<name>"),
        ("optim", "adamw_torch", "use optimizer=adamw"),
        ("bf16", True, "use trainer.precision=bf16-mixed"),
        ("bf16", False, "use trainer.precision=32-true"),
        ("datasets", ["hh"], "use data=hh"),
        ("datasets", ["shp"], "use data.train=<file or hub id>"),
        # A share of a pass is no number of steps.
        ("trainer.val_check_interval", 0.25, "use evaluation.every_n_steps=<steps>"),
        ("trainer.val_check_interval", 100, "use evaluation.every_n_steps=100"),
        # Examples there, steps here.
        ("eval_every", 20000, "use evaluation.every_n_steps=<steps> (in steps, not in examples)"),
        ("save_steps", 500, "use checkpoint.every_n_steps=500"),
        ("output_dir", "out", "use hydra.run.dir=out"),
        ("report_to", "none", "use logger=none"),
        ("lora_target_modules", ["q", "v"], "use peft=lora peft.target_modules=[q,v]"),
        ("loss.reference_free", True, "use reference=none"),
        ("sample_during_eval", False, "use evaluation.samples=0"),
        ("max_steps", -1, "use trainer.max_steps=null"),
        ("bf16_full_eval", False, "leave it out"),
        ("loss.beta", 0.2, "beta has one place: beta=<value>"),
        ("padding_free", True, "nothing is padded here"),
        ("sync_ref_model", True, "use reference.sync_every=512"),
        ("sync_ref_model", False, "leave it out"),
        ("ref_model_sync_steps", 64, "use reference.sync_every=64"),
        ("ref_model_mixup_alpha", 0.3, "use reference.sync_alpha=0.3 (of the policy, as there)"),
        ("lora_r", True, "use peft=lora peft.r=<rank>"),
        ("lr", 10**400, "use optimizer.lr=<rate>"),
        ("output_dir", ["a"], "use hydra.run.dir=<folder>"),
    ],
)
def test_the_answer_has_the_typed_value_where_it_means_the_same(
    key: str, value: object, said: str
) -> None:
    assert f"{key}: unknown key; {said}" in unknown_key(key, value)


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *(("dpo", "sigmoid"), ("DPO", "sigmoid"), ("IPO", "ipo"), ("SimPO", "simpo")),
        *(("bco-pair", "bco_pair"), ("Sim-PO", "simpo"), ("APO-zero", "apo_zero")),
        *(("sigmoid", None), ("cdpo", None), ("tdpo", None), ("odpo", None), ("d", None)),
    ],
)
def test_another_spelling_of_a_loss(name: str, ours: str | None) -> None:
    assert renamed_loss(name, known_losses()) == ours


METHODS = (
    *("cdpo", "rdpo", "dpop", "tdpo", "xpo", "spo", "kpo", "ropo", "ppo", "grpo", "nca"),
    *("exo", "sppo", "apo", "aot_pair", "kto_unpaired", "bco_unpaired", "cal_dpo", "lpo"),
    *("nco_pair", "tr_dpo", "iterative_dpo", "step_dpo", "simnpo", "dro", "copo", "slic_hf"),
)


@pytest.mark.parametrize("name", METHODS)
def test_no_guess_turns_one_method_into_another(name: str) -> None:
    answer = unknown_option("loss", name, [*known_losses()])
    known = VALUES["loss"].get(name)
    if known is None:
        assert near_miss(name, known_losses()) is None
        assert "did you mean" not in answer
    else:
        assert known.use in answer


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("sigmod", "sigmoid"), ("robst", "robust"), ("apo_zer", "apo_zero"), ("softmx", "softmax")],
)
def test_a_typing_error_is_seen(typed: str, meant: str) -> None:
    assert unknown_option("loss", typed, [*known_losses()]).endswith(f"did you mean loss={meant}?")


@pytest.mark.parametrize(
    ("group", "option", "said"),
    [
        ("loss", "cdpo", "use loss=sigmoid loss.label_smoothing=<share of wrong labels>"),
        ("loss", "rdpo", "did you mean loss=robust?"),
        ("loss", "dpop", "loss.rpo_alpha"),
        ("model", "pythia28", "did you mean model.pretrained=EleutherAI/pythia-2.8b?"),
        ("trainer", "FSDPTrainer", "did you mean strategy=fsdp?"),
        ("optimizer", "RMSprop", "it is unsupported"),
        ("strategy", "deepspeed_stage_3", "did you mean strategy=fsdp?"),
        ("logger", "neptune", "did you mean logger=csv?"),
    ],
)
def test_a_choice_of_another_program(group: str, option: str, said: str) -> None:
    assert said in unknown_option(group, option, ["x"])


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("trainer.devices", -1, "trainer.devices=auto"),
        ("trainer.max_steps", -1, "trainer.max_steps=null"),
        ("trainer.precision", "fp16", "trainer.precision=16-mixed"),
        ("trainer.precision", 32, "trainer.precision=32-true"),
        ("model.dtype", "bf16", "model.dtype=bfloat16"),
        ("data.truncation", "keep_start", "data.truncation=response"),
        ("optimizer.schedule", "constant_with_warmup", "optimizer.schedule=constant"),
        ("optimizer.name", "adamw_torch", "optimizer=adamw"),
    ],
)
def test_a_value_of_another_program(key: str, value: object, meant: str) -> None:
    answer = wrong_value(key, value)
    assert answer.startswith(f"{key}=")
    assert f"; did you mean {meant}?" in answer
