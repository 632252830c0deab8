"""LoRA: gradients of a plain loop, a reference that is the base model to the bit, a frozen head."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.sampling import answer_prompts, sampled_divergences
from dpo_lightning.models.adapter_files import read_adapter
from dpo_lightning.models.adapters import (
    Adapters,
    LoraSettings,
    adapter_dropout_off,
    count_parameters,
)
from dpo_lightning.models.config_numbers import without_dropout
from dpo_lightning.models.master_weights import MasterWeights, cast_frozen
from dpo_lightning.models.probe import choose_path
from tests.support.models import FAMILIES, VOCABULARY, byte_tokenizer, tiny_llama_config
from tests.support.operations import Results

NEW = LoraSettings(r=4, alpha=8, target_modules=None, rslora=False, dora=False, gaussian=False)
VARIANTS = {
    "lora": NEW,
    "rslora": LoraSettings(4, 8, ["q_proj", "down_proj"], True, False, False),
    "dora": LoraSettings(4, 8, None, False, True, True),
}


def make_model(family: str = "llama"):
    kind, values = FAMILIES[family]
    torch.manual_seed(0)
    config = without_dropout(getattr(transformers, kind)(**values))
    return AutoModelForCausalLM.from_config(config).train()


def make_adapters(model, start=NEW, **changes) -> Adapters:
    options = {"reference": None, "dropout": 0.0, "seed": 3, "load_base": None} | changes
    return Adapters(model, start, **options)


def shake(model, seed: int = 5) -> None:
    """Fills trained matrices with any values: a new adapter does nothing yet."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def make_groups() -> list[TokenGroup]:
    draw = np.random.default_rng(1)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, VOCABULARY, n).astype(np.int32)

    return [
        TokenGroup(ids(4), (ids(3), ids(6)), (1, 2), 1.0, "a", "a"),
        TokenGroup(ids(9), (ids(5), ids(2)), (1, 2), 1.0, "b", "b"),
    ]


def plain_logps(model, group: TokenGroup) -> list[torch.Tensor]:
    """Log-probabilities by a forward pass a response, nothing shared, nothing padded."""
    found = []
    for response in group.responses:
        row = torch.tensor(np.concatenate([group.prompt, response]).astype(np.int64))[None]
        logps = model(input_ids=row).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(1, row[0, len(group.prompt) :, None]).sum())
    return found


def stored(folder, model, *, edit=None, drop=(), **settings):
    """Writes an adapter with any values as PEFT does, and changes what it wrote."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **options))
    shake(wrapped, seed=11)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    if edit:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    weights = load_file(folder / "adapter_model.safetensors")
    if drop:
        kept = {name: value for name, value in weights.items() if not name.endswith(tuple(drop))}
        assert len(kept) < len(weights)
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder):
    return read_adapter(str(folder), key="peft.adapter")


# Gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_has_the_gradients_of_a_plain_loop(variant, checkpointing):
    """-log sigmoid(beta * margin) of PEFT's own wrapper, response by response.

    Adding up the flat batch in another order changes float32 sums of about a hundred terms: 1e-4.
    """
    model = make_model()
    plain = copy.deepcopy(model)
    scorer, reason = choose_path(model, max_length=32)
    assert reason is None
    settings = VARIANTS[variant]
    adapters = make_adapters(model, settings)
    shake(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(task_type="CAUSAL_LM", **settings.arguments())
    wrapped = get_peft_model(plain, config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    theirs = dict(plain.named_parameters())
    assert names == [name for name, p in theirs.items() if p.requires_grad]
    with torch.no_grad():
        for name in names:
            theirs[name].copy_(model.get_parameter(name))
    beta, groups = 0.3, make_groups()

    expected = torch.zeros(())
    for group in groups:
        chosen, rejected = plain_logps(wrapped, group)
        with torch.no_grad(), wrapped.disable_adapter():
            base_chosen, base_rejected = plain_logps(wrapped, group)
        margin = (chosen - base_chosen) - (rejected - base_rejected)
        expected = expected - torch.nn.functional.logsigmoid(beta * margin)
    expected.backward()

    batch = collate_groups(groups, [0, 1])
    with Results() as forward:
        logps = scorer.logps(model, batch)
    with torch.no_grad():
        ratios = scorer.logps(adapters.reference, batch)
    ratios = logps - ratios
    loss = -torch.nn.functional.logsigmoid(beta * (ratios[0::2] - ratios[1::2])).sum()
    with Results() as backward:
        loss.backward()
    # What the head gives the states was found on the way there: scores are not looked at again.
    assert VOCABULARY in forward.sizes
    assert VOCABULARY not in backward.sizes
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(
                parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name
            )
        else:
            assert parameter.grad is None
            assert not parameter.requires_grad


def test_bfloat16_has_float32_masters_of_the_adapter_alone():
    model = make_model()
    make_adapters(model)
    cast_frozen(model, torch.bfloat16)
    types = {p.requires_grad: p.dtype for p in model.parameters()}
    assert types == {False: torch.bfloat16, True: torch.float32}
    shake(model)
    values = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    masters = MasterWeights(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in masters.parameters) == count_parameters(model)[1]
    masters.restore()
    for own, value in zip((p for p in model.parameters() if p.requires_grad), values, strict=True):
        assert torch.equal(own, value)


# The reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-capped", "gpt2", "gpt-neox", "opt"])
def test_the_reference_is_the_base_model_to_the_bit(family):
    """Equal before any step, after some, and with dropout in the trained adapter."""
    base = make_model(family).eval()
    model = make_model(family)
    scorer, reason = choose_path(model, max_length=32)
    assert reason is None
    scorer.prepare(base)
    batch = collate_groups(make_groups(), [0, 1])
    with torch.no_grad():
        expected = scorer.logps(base, batch)
    adapters = make_adapters(model, dropout=0.5)
    policy = scorer.logps(model, batch)
    assert torch.equal(policy, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        (-scorer.logps(model, batch)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference = scorer.logps(adapters.reference, batch)
        assert torch.equal(reference, expected)
        assert not torch.equal(scorer.logps(model, batch), expected)
    with torch.no_grad(), scorer.plain(base) as one, scorer.plain(adapters.reference) as other:
        ids = batch.input_ids[None]
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
    assert model.config._attn_implementation == base.config._attn_implementation


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_policy_comes_back_as_it_was(with_adapter, tmp_path):
    model = make_model()
    frozen = read(stored(tmp_path, model)) if with_adapter else None
    adapters = make_adapters(model, reference=frozen, dropout=0.5)
    shake(model)
    model.model.layers[0].eval()

    def state():
        modules = [module.training for module in model.modules()]
        return modules, [(n, p.requires_grad) for n, p in model.named_parameters()]

    before = state()
    trained = [name for name, requires_grad in before[1] if requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    ids = torch.tensor([[3, 4, 5]])
    with adapter_dropout_off(model):
        logits = model(input_ids=ids).logits
    adapters.reference(input_ids=ids)
    assert state() == before
    with pytest.raises(ValueError, match="input_ids"):
        adapters.reference(nonsense=1)
    assert state() == before
    with adapter_dropout_off(model):
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert not torch.equal(adapters.reference(input_ids=ids).logits, logits)
    # Moving, freezing or switching the reference is nothing that the policy notices.
    adapters.reference.requires_grad_(False).eval().train().to(torch.device("cpu"))
    assert state() == before


def test_policy_and_reference_can_be_used_beside_each_other():
    """Divergences and answers are those of two models, although it is one."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llama_config()).eval()
    model = copy.deepcopy(base)
    scorer, _ = choose_path(model, max_length=64)
    scorer.prepare(base)
    adapters = make_adapters(model)
    shake(model)
    prompts = [np.array([7, 8, 9], dtype=np.int32), np.array([11, 12], dtype=np.int32)]
    common = {"max_new_tokens": 5, "batch_size": 2, "seed": 4}
    own = answer_prompts(model, scorer, tokenizer, prompts, **common)
    one = answer_prompts(adapters.reference, scorer, tokenizer, prompts, **common)
    two = answer_prompts(base, scorer, tokenizer, prompts, **common)
    assert [a.tolist() for a in one] == [a.tolist() for a in two]
    found = [
        sampled_divergences(model, reference, scorer, prompts, own, pad=2)
        for reference in (adapters.reference, base)
    ]
    assert found[0] == found[1]
    assert min(found[0]) > 0.01
    assert model.training is False


def test_a_stored_adapter_is_the_start_and_frozen_the_reference(tmp_path):
    model = make_model()
    base = copy.deepcopy(model).eval()
    folder = stored(tmp_path, model)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    file = read(folder)
    adapters = make_adapters(model, file, reference=file)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = theirs(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(adapters.reference(input_ids=ids).logits, expected)
    shake(model)
    assert torch.equal(adapters.reference(input_ids=ids).logits, expected)
    assert not torch.equal(model(input_ids=ids).logits, expected)
    total, trained = count_parameters(model)
    assert total == base.num_parameters() + trained
    assert trained == sum(value.numel() for value in file.weights.values())


# What starts, ends and is written ----------------------------------------------------------------


def test_new_matrices_are_those_of_the_seed_whatever_was_drawn_before():
    first, second, third = make_model(), make_model(), make_model()
    make_adapters(first)
    torch.rand(7)
    state = torch.get_rng_state()
    make_adapters(second)
    assert torch.equal(torch.get_rng_state(), state)
    make_adapters(third, seed=4)
    a, b, c = (dict(m.named_parameters()) for m in (first, second, third))
    names = [name for name in a if "lora_A" in name]
    assert names
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert not any(torch.equal(a[name], c[name]) for name in names)


def test_rounded_weights_come_back_and_merge_to_the_same_function(tmp_path):
    model = make_model()
    base = copy.deepcopy(model).eval()
    adapters = make_adapters(model, load_base=lambda: base)
    shake(model)
    cast_frozen(model, torch.bfloat16)
    adapters.restore_base()
    model.eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    logits = model(input_ids=ids).logits
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            own = model.get_parameter(name) if name in dict(model.named_parameters()) else None
            assert own is None or torch.equal(own, parameter), name
    adapters.save(tmp_path, base="the/base", revision="abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("the/base", "abc")
    assert config["inference_mode"] is True
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    merged = adapters.merge()
    assert merged is model
    assert [name for name, _ in merged.named_parameters()] == [
        n for n, _ in base.named_parameters()
    ]
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "tied"),
    [(["lm_head"], False), (["q_proj", "lm_head"], True), (["embed_tokens"], True)],
)
def test_a_new_adapter_of_the_head_is_refused(names, tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied))
    with pytest.raises(UserError, match=f"{names[-1]}.*head"):
        make_adapters(model, LoraSettings(4, 8, names, False, False, False))


def test_embeddings_that_are_not_the_head_can_be_adapted():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=False))
    make_adapters(model, LoraSettings(4, 8, ["embed_tokens"], False, False, False))
    assert count_parameters(model)[1] == 4 * (259 + 16)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": r".*\.q_proj|lm_head"}]
)
@pytest.mark.parametrize("role", ["start", "reference"])
def test_a_stored_adapter_of_the_head_is_refused(settings, role, tmp_path):
    model = make_model()
    file = read(stored(tmp_path, model, **settings))
    arguments = {"start": file} if role == "start" else {"reference": file}
    with pytest.raises(UserError, match=r"peft.adapter=.*lm_head.*head"):
        make_adapters(model, **arguments)


def test_whole_modules_beside_the_head_are_trained_and_switched_off(tmp_path):
    """A norm of its own: the reference has the base model's, to the bit."""
    model = make_model()
    base = copy.deepcopy(model).eval()
    file = read(stored(tmp_path, model, modules_to_save=["model.norm"]))
    adapters = make_adapters(model, file)
    assert any("norm" in name for name, p in model.named_parameters() if p.requires_grad)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = base(input_ids=ids).logits
    assert torch.equal(adapters.reference(input_ids=ids).logits, expected)
    assert not torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ("layers.0.self_attn.q_proj.lora_A.weight",)}, "lora_A.weight is not in it"),
        ({"edit": {"r": 8}}, "is \\(4, 32\\) in it and \\(8, 32\\) here"),
        ({"edit": {"target_modules": ["q_proj"]}}, "has no place in this model"),
        ({"edit": {"target_modules": ["nothing"]}}, "nothing.*name modules that this model has"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes, message, tmp_path):
    model = make_model()
    file = read(stored(tmp_path, model, **changes))
    with pytest.raises(UserError, match=message) as caught:
        make_adapters(model, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"peft_type": "IA3"}, "kind IA3"),
        ({"task_type": "SEQ_CLS"}, "for SEQ_CLS"),
        ({"bias": "all"}, "bias=all changes the base model"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 belongs to changed base weights"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config="),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"of_a_later_version": True}, "of_a_later_version=True is not supported"),
    ],
)
def test_what_an_adapter_may_not_do_is_refused_by_name(edit, message, tmp_path):
    folder = stored(tmp_path, make_model(), edit=edit)
    with pytest.raises(UserError, match=f"peft.adapter={folder}.*{message}"):
        read(folder)


def test_no_pickle_is_opened(tmp_path):
    folder = stored(tmp_path, make_model())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="no adapter in safetensors"):
        read(folder)


def test_a_damaged_file_is_one_line(tmp_path):
    folder = stored(tmp_path, make_model())
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="a damaged file"):
        read(folder)


def test_the_hash_is_of_what_the_adapter_does(tmp_path):
    """Scale, kind and every number count; where it came from, dropout and order do not."""
    model = make_model()
    first = read(stored(tmp_path / "a", model)).hash()
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())

    def edited(**changes) -> str:
        path.write_text(json.dumps(config | changes))
        return read(tmp_path / "a").hash()

    names = config["target_modules"]
    names = names[::-1] if isinstance(names, list) else names
    assert edited(base_model_name_or_path="x", lora_dropout=0.5, target_modules=names) == first
    assert len({first, edited(lora_alpha=9), edited(use_rslora=True), edited(use_dora=True)}) == 4
    path.write_text(json.dumps(config))
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name][0, 0] += 1e-3
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    assert read(tmp_path / "a").hash() != first
