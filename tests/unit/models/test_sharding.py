"""A sharded model gives the numbers of the whole one; on one rank, where all the code runs too."""

import copy

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.master_weights import MasterWeights, cast_frozen, cast_parameters
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import (
    decoder_layers,
    in_shards,
    is_sharded,
    like_shard,
    set_gradient_sync,
    shard_model,
    whole_model,
    whole_tensor,
)
from tests.support.batches import random_groups
from tests.support.models import FAMILIES, PADDED_ONLY, make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def prepared(family: str, path: str):
    model = make_model(family).train()
    scorer = Scorer(path)
    scorer.prepare(model)
    return model, scorer


@pytest.mark.parametrize(
    ("family", "path"),
    [(family, "flat") for family in FAMILIES] + [("bloom", "padded"), ("falcon", "padded")],
)
def test_a_sharded_model_has_the_same_scores_and_gradients(mesh, family: str, path: str):
    """Two micro-batches, of which the last alone reduces: gradients are the sum of both."""
    assert family in FAMILIES | PADDED_ONLY
    model, scorer = prepared(family, path)
    plain = copy.deepcopy(model)
    sharded = shard_model(model, mesh, CPU, compute_dtype=None)
    assert is_sharded(sharded)
    assert not is_sharded(plain)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    batches = [collate_groups([group], [0]) for group in random_groups(2)]
    for number, batch in enumerate(batches):
        set_gradient_sync(sharded, last=number == 1, every=False)
        for each in (plain, sharded):
            logps = scorer.logps(each, batch)
            (logps * torch.arange(1, len(logps) + 1)).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(scorer.logps(sharded, batch), scorer.logps(plain, batch))
    in_shards(sharded)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    found = {name: p.grad for name, p in sharded.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(
                found[name].full_tensor(), gradient, rtol=1e-5, atol=1e-6, msg=name
            )


def test_weights_are_gathered_in_the_type_that_is_computed_in(mesh):
    """Equal to bfloat16 weights behind float32 ones, to the bit; gradients are float32."""
    model, scorer = prepared("llama", "flat")
    rounded = cast_parameters(copy.deepcopy(model), torch.bfloat16)
    sharded = shard_model(model, mesh, CPU, compute_dtype=torch.bfloat16)
    batch = collate_groups(random_groups(3), range(3))
    logps = scorer.logps(sharded, batch)
    torch.testing.assert_close(logps, scorer.logps(rounded, batch), rtol=0, atol=0)
    logps.sum().backward()
    assert {p.dtype for p in sharded.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in sharded.parameters()} == {torch.float32}


def test_gradients_of_micro_batches_are_added_up_in_float32(mesh):
    """The sum of two bfloat16 gradients to the bit; most sums have more bits than a bfloat16.

    Each is that of a model whose weights are bfloat16, of one micro-batch alone.
    """
    model, scorer = prepared("llama", "flat")
    rounded = cast_parameters(copy.deepcopy(model), torch.bfloat16)
    sharded = shard_model(model, mesh, CPU, compute_dtype=torch.bfloat16)
    batches = [collate_groups([group], [0]) for group in random_groups(2)]
    expected = [torch.zeros(p.shape) for p in rounded.parameters()]
    for number, batch in enumerate(batches):
        set_gradient_sync(sharded, last=number == 1, every=False)
        scorer.logps(sharded, batch).sum().backward()
        rounded.zero_grad()
        scorer.logps(rounded, batch).sum().backward()
        for total, parameter in zip(expected, rounded.parameters(), strict=True):
            total += parameter.grad.float()
    in_shards(sharded)
    found = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
    for gradient, total in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, total, rtol=1e-6, atol=0)
    lost = [(total != total.bfloat16().float()).float().mean() for total in expected]
    assert max(lost) > 0.5


def test_a_reference_before_the_first_step_leaves_an_adapter_s_gradients_in_float32(mesh):
    """Equal to float32 masters behind bfloat16 matrices, where the first pass trains nothing."""
    model, scorer = prepared("llama", "flat")
    new = LoraSettings(4, 8, None, rslora=False, dora=False, gaussian=True)

    def adapt(policy):
        return Adapters(policy, new, reference=None, dropout=0.0, seed=3, load_base=lambda: None)

    plain, adapters = copy.deepcopy(model), adapt(model)
    adapt(plain)
    for each in (plain, model):
        cast_frozen(each, torch.bfloat16)
    masters = MasterWeights(plain, torch.bfloat16)
    sharded = shard_model(model, mesh, CPU, compute_dtype=torch.bfloat16)
    batch = collate_groups(random_groups(3), range(3))
    with torch.no_grad():
        reference = scorer.logps(adapters.reference, batch)
    for each in (plain, sharded):
        logps = scorer.logps(each, batch)
        logps.sum().backward()
        # A new adapter does nothing yet.
        torch.testing.assert_close(logps, reference, rtol=0, atol=0)
    found = [p.grad.full_tensor() for p in sharded.parameters() if p.requires_grad]
    assert len(found) == len(masters.parameters)
    for gradient, master in zip(found, masters.parameters, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, master.grad, rtol=1e-6, atol=0)


def test_a_sharded_model_makes_one_forward_pass_whatever_the_widths(mesh):
    """Ranks meet in each forward pass of the padded path: the number must not follow the rows."""
    model, scorer = prepared("bloom", "padded")
    sharded = shard_model(copy.deepcopy(model), mesh, CPU, compute_dtype=None)
    passes = []
    for each in (model, sharded):
        each.register_forward_pre_hook(lambda module, *_: passes.append(is_sharded(module)))
    for widths in ((1, 1), (2, 40), (1, 6, 60)):
        responses = tuple(np.full(width, 5, dtype=np.int32) for width in widths)
        ranks = tuple(range(1, len(widths) + 1))
        group = TokenGroup(np.array([3, 4], dtype=np.int32), responses, ranks, 1.0, "row", "key")
        batch = collate_groups([group], [0])
        passes.clear()
        with torch.no_grad():
            found = scorer.logps(sharded, batch)
            assert passes == [True]
            torch.testing.assert_close(found, scorer.logps(model, batch), rtol=1e-5, atol=1e-5)
        # One process alone takes rows of like widths together, each width in a pass of its own.
        assert passes.count(False) == (1 if widths == (1, 1) else len(widths))


def test_what_a_family_keeps_in_float32_stays_so(mesh):
    model, scorer = prepared("llama", "flat")
    model._keep_in_fp32_modules = ["norm"]
    rounded = cast_parameters(copy.deepcopy(model), torch.bfloat16)
    sharded = shard_model(model, mesh, CPU, compute_dtype=torch.bfloat16)
    batch = collate_groups(random_groups(3), range(3))
    seen = {}
    norm = sharded.model.norm
    norm.register_forward_hook(lambda module, *_: seen.update(dtype=module.weight.dtype))
    torch.testing.assert_close(scorer.logps(sharded, batch), scorer.logps(rounded, batch))
    assert seen == {"dtype": torch.float32}


def test_the_head_is_gathered_once_a_step(mesh, monkeypatch):
    """Three micro-batches: each layer is gathered for each pass, what is around them once."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    model, scorer = prepared("llama", "flat")
    layers = len(list(decoder_layers(model)))
    assert layers >= 2
    sharded = shard_model(model, mesh, CPU, compute_dtype=None)
    gathers = []
    original = FSDPParamGroup._to_unsharded

    def count(group):
        gathers.append(len(group.fsdp_params))
        return original(group)

    monkeypatch.setattr(FSDPParamGroup, "_to_unsharded", count)
    for step in range(2):
        gathers.clear()
        for number in range(3):
            set_gradient_sync(sharded, last=number == 2, every=False)
            batch = collate_groups(random_groups(3)[number : number + 1], [0])
            scorer.logps(sharded, batch).sum().backward()
        root = len([n for n, _ in sharded.named_parameters() if ".layers." not in n])
        # Embeddings, last norm and head together, and each layer forth and back; the last layer
        # is still there when the backward pass begins.
        assert gathers.count(root) == 1, (step, gathers)
        assert len(gathers) - 1 >= 3 * (2 * layers - 1)


@pytest.mark.parametrize("every", [False, True])
def test_gradients_are_reduced_when_they_are_asked_for(mesh, every: bool):
    """A shard has a gradient once one was reduced: after the last backward pass, or after each."""
    model, scorer = prepared("llama", "flat")
    layer = next(decoder_layers(model))
    sharded = shard_model(model, mesh, CPU, compute_dtype=None)
    batch = collate_groups(random_groups(1), [0])
    for last in (False, True):
        set_gradient_sync(sharded, last=last, every=every)
        scorer.logps(sharded, batch).sum().backward()
        reduced = {p.grad is not None for p in layer.parameters() if isinstance(p, DTensor)}
        assert reduced == {last or every}


def test_a_tied_model_comes_back_whole_and_tied(mesh, tmp_path):
    model, _ = prepared("gpt2", "flat")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharded = shard_model(model, mesh, CPU, compute_dtype=None)
    assert sharded.lm_head.weight is sharded.transformer.wte.weight
    assert isinstance(sharded, FSDPModule)
    whole = whole_model(sharded, keep=True)
    assert not is_sharded(whole)
    assert whole.lm_head.weight is whole.transformer.wte.weight
    assert whole.state_dict().keys() == expected.keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    whole.save_pretrained(tmp_path)
    assert whole_model(sharded, keep=False) is None


def test_a_rank_without_weights_has_the_same_names(mesh):
    """The other ranks shard a model without weights; its tensors must line up."""
    model, _ = prepared("gemma3-text", "flat")
    meta = meta_model(model.config, dtype=torch.float32)
    names = [(n, t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    assert [(n, t.shape) for n, t in [*meta.named_parameters(), *meta.named_buffers()]] == names
    assert {t.device.type for t in meta.parameters()} == {"meta"}


def test_a_tensor_goes_into_shards_and_back(mesh):
    model, _ = prepared("llama", "flat")
    sharded = shard_model(model, mesh, CPU, compute_dtype=None)
    shard = next(sharded.parameters())
    value = torch.randn(shard.shape)
    assert torch.equal(whole_tensor(like_shard(value, shard), keep=True), value)
    assert whole_tensor(shard, keep=False) is None
    assert torch.equal(like_shard(value, value), value)
