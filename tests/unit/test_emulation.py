"""The modes by which tests take a step as a GPU does: autocast, the kernel, the watch."""

import contextlib
import inspect
import re

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import varlen

from tests.support import autocast
from tests.support.autocast import CUDA, CastLists, EmulatedAutocast, cuda_autocast
from tests.support.flash import REAL, FlashError, plain_varlen, strict_varlen_attn
from tests.support.watch import Watch

META, CPU = torch.device("meta"), torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# Autocast ---------------------------------------------------------------------------------------

# Registered for autocast, and nothing that a model of text calls; or names of variants.
UNCALLED = re.compile(r"^(upsample|_upsample|stft|cudnn|_thnn|binary_cross_entropy$)")


def registered(key: str) -> set[str]:
    """Names of the operations that torch's own autocast casts on a device."""
    found = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    names = {name.removeprefix("aten::").partition(".")[0] for name in found if "aten::" in name}
    return {name for name in names if not UNCALLED.match(name)}


def test_the_lists_are_those_of_the_installed_torch():
    """Each operation that CUDA's autocast casts is in one list, and none besides."""
    lists = (CUDA.half, CUDA.float32, CUDA.widest)
    ours = {name for names in lists for name in names if not UNCALLED.match(name)}
    assert sum(map(len, lists)) == len(CUDA.half | CUDA.float32 | CUDA.widest)
    assert ours == registered("AutocastCUDA")


def on_cpu(name: str) -> frozenset[str]:
    return frozenset(registered("AutocastCPU") & getattr(CUDA, name))


ON_CPU = CastLists(
    half=on_cpu("half"),
    float32=on_cpu("float32") | frozenset({"cross_entropy_loss"}),
    widest=on_cpu("widest") | frozenset({"cat", "stack", "index_copy"}),
)


class Layer(torch.nn.Module):
    """A bit of everything: products, a norm by hand, a softmax, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        query = self.query(x * self.scale)
        scores = (query @ query.transpose(-1, -2)).softmax(-1)
        mixed = torch.matmul(scores, query) + x
        return F.silu(mixed), self.out(mixed), F.cross_entropy(self.out(mixed)[0], torch.arange(3))


def results(context):
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(2, 3, 8)
    with context:
        outputs = layer(x)
    sum(output.float().sum() for output in outputs).backward()
    return [*outputs, *(parameter.grad for parameter in layer.parameters())]


@contextlib.contextmanager
def both(lists: CastLists):
    """CUDA's autocast switched on, and the mode that heeds it on a CPU."""
    with cuda_autocast(BF16), EmulatedAutocast(lists, device="cpu"):
        yield


def test_the_mode_does_what_autocast_does_on_a_cpu():
    """Types and values of results, and of the gradients behind them, to the bit.

    A weight is cast at each use: autocast's cache would add up the gradients of both in half.
    """
    expected = results(torch.autocast("cpu", dtype=BF16, cache_enabled=False))
    found = results(both(ON_CPU))
    assert {tensor.dtype for tensor in expected[:3]} == {BF16, F32}
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    without = results(EmulatedAutocast(ON_CPU, device="cpu"))
    assert {tensor.dtype for tensor in without} == {F32}


@pytest.mark.parametrize(
    ("call", "given", "expected"),
    [
        (lambda x: x @ x, F32, BF16),
        (lambda x: torch.mm(x, x), F32, BF16),
        (lambda x: F.linear(x, x), F32, BF16),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), F32, BF16),
        (lambda x: x.softmax(-1), BF16, F32),
        (lambda x: x.pow(2), BF16, F32),
        (lambda x: x**2, BF16, F32),
        (lambda x: 1 / x, BF16, F32),
        (lambda x: x.sum(), BF16, F32),
        (lambda x: x.logsumexp(-1), BF16, F32),
        (lambda x: F.cross_entropy(x, x[:, 0].long()), BF16, F32),
        (lambda x: torch.addcmul(x, x.to(BF16), x), F32, F32),
        (lambda x: F.silu(x), F32, F32),
        (lambda x: x.to(BF16) + x, F32, F32),
        (lambda x: x.mean(), BF16, BF16),
        (lambda x: x @ x, torch.float64, torch.float64),
    ],
)
def test_types_under_cuda_autocast(call, given, expected):
    """As the page of torch on automatic mixed precision has them for CUDA."""
    x = torch.ones(4, 4, dtype=given, device=META)
    with cuda_autocast(BF16), EmulatedAutocast():
        assert call(x).dtype == expected
        with torch.autocast("cuda", enabled=False):
            assert torch.is_autocast_enabled("cuda") is False
            assert (x @ x).dtype == given
    assert torch.is_autocast_enabled("cuda") is False


def test_models_switch_it_off_where_they_do_on_cuda():
    from transformers.utils import generic

    with cuda_autocast(BF16), EmulatedAutocast():
        x = torch.ones(4, 4, device=META)
        with generic.maybe_autocast(device_type="meta", enabled=False):
            assert (x @ x).dtype == BF16
        with (
            autocast.heeded_by_models(),
            generic.maybe_autocast(device_type="meta", enabled=False),
        ):
            assert (x @ x).dtype == F32


# The kernel -------------------------------------------------------------------------------------


def call(device=META, dtype=BF16, *, heads=4, key_heads=2, size=16, **changes):
    """Arguments of a call that is right: two sequences, of 3 and 2 queries, 4 and 2 keys."""
    values = {
        "query": torch.ones(5, heads, size, dtype=dtype, device=device),
        "key": torch.ones(6, key_heads, size, dtype=dtype, device=device),
        "value": torch.ones(6, key_heads, size, dtype=dtype, device=device),
        "cu_seq_q": torch.tensor([0, 3, 5], dtype=torch.int32).to(device),
        "cu_seq_k": torch.tensor([0, 4, 6], dtype=torch.int32).to(device),
        "max_q": 3,
        "max_k": 4,
        "scale": 0.25,
        "window_size": (-1, 0),
        "enable_gqa": heads != key_heads,
    }
    return values | {name: change(values) for name, change in changes.items()}


def test_the_stand_in_is_called_as_the_kernel_is():
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    assert REAL is varlen.varlen_attn
    assert parameters(strict_varlen_attn) == parameters(REAL)


@pytest.mark.parametrize("size", [8, 16, 256])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_call_that_flash_takes(dtype, size):
    values = call(dtype=dtype, size=size)
    values["query"].requires_grad_()
    output = strict_varlen_attn(**values)
    assert output.shape == (5, 4, size)
    output.sum().backward()
    assert values["query"].grad.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": lambda v: v["query"].float()}, "only fp16 and bf16"),
        ({"key": lambda v: v["key"].float()}, "key torch.float32"),
        ({"value": lambda v: v["value"][..., :8]}, "heads differ"),
        ({"value": lambda v: v["value"].half()}, "value torch.float16"),
        ({"key": lambda v: v["key"][:, :1]}, "heads differ"),
        ({"query": lambda v: v["query"][None]}, "4 dimensions"),
        ({"query": lambda v: torch.ones(16, 4, 5, dtype=BF16, device=META).mT.transpose(0, 1)},
         "contiguous last dimension"),
        ({"query": lambda v: torch.ones(5, 3, 16, dtype=BF16, device=META)}, "3 heads, 2 of keys"),
        ({"cu_seq_q": lambda v: v["cu_seq_q"].long()}, "cu_seq_q must be one dimension of int32"),
        ({"cu_seq_k": lambda v: v["cu_seq_k"].cpu()}, "cu_seq_k must be contiguous, and on meta"),
        ({"cu_seq_k": lambda v: v["cu_seq_k"][:2]}, "other numbers of sequences"),
        ({"max_q": lambda v: torch.tensor(3)}, "max_q must be an int"),
        ({"max_k": lambda v: 4.0}, "max_k must be an int"),
        ({"window_size": lambda v: (None, 0)}, "window_size"),
    ],
)  # fmt: skip
def test_a_call_that_flash_refuses(changes, said):
    if "cu_seq_k" in changes and said.endswith("meta"):
        changes = {"cu_seq_k": lambda v: torch.tensor([0, 4, 6], dtype=torch.int32)}
    with pytest.raises(FlashError, match=said):
        strict_varlen_attn(**call(**changes))


@pytest.mark.parametrize(("size", "said"), [(12, "multiple of 8"), (264, "at most 256")])
def test_heads_that_flash_refuses(size, said):
    with pytest.raises(FlashError, match=said):
        strict_varlen_attn(**call(size=size))


def test_with_values_it_is_plain_attention():
    values = call(CPU)
    expected = plain_varlen(**values)
    torch.testing.assert_close(strict_varlen_attn(**values), expected, rtol=0, atol=0)


# The watch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "copies", "answers"),
    [
        (lambda x, here: here.to(META), 1, 0),
        (lambda x, here: here.to(META, non_blocking=True), 0, 0),
        (lambda x, here: x.copy_(here), 1, 0),
        (lambda x, here: x.copy_(here, non_blocking=True), 0, 0),
        (lambda x, here: x.new_tensor(3.0), 1, 0),
        (lambda x, here: torch.tensor([1, 2], device=META), 1, 0),
        (lambda x, here: x.new_full((), 3.0), 0, 0),
        (lambda x, here: torch.zeros(3, device=META), 0, 0),
        (lambda x, here: x + 1.0, 0, 0),
        (lambda x, here: x * torch.tensor(2.0), 0, 0),
        (lambda x, here: x[here.long()], 1, 0),
        (lambda x, here: x.sum().item(), 0, 1),
        (lambda x, here: float(x.sum()), 0, 1),
        (lambda x, here: bool((x > 0).all()), 0, 1),
        (lambda x, here: x.tolist(), 0, 1),
        (lambda x, here: x.cpu(), 0, 1),
        (lambda x, here: here.copy_(x), 0, 1),
        (lambda x, here: torch.where(x > 0, x, 0.0), 0, 0),
        (lambda x, here: here.float().sum().item(), 0, 0),
    ],
)
def test_what_the_host_waits_for_is_seen(do, copies, answers):
    x, here = torch.zeros(3, device=META), torch.zeros(3)
    with Watch() as watch:
        do(x, here)
    assert (len(watch.copies), len(watch.answers)) == (copies, answers), watch.events


@pytest.mark.parametrize(
    "do", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.unique(x)]
)
def test_what_has_as_many_entries_as_the_values_say_is_seen(do):
    """Also where ``meta`` cannot do it."""
    with Watch() as watch, contextlib.suppress(NotImplementedError, RuntimeError):
        do(torch.zeros(3, device=META))
    assert len(watch.answers) == 1
