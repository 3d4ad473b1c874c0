"""Attention: the arithmetic, the choice of an implementation, and flash-attn on stand-ins."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from pgolf.config import ModelConfig
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.ops.attention import (
    OPERATOR,
    PACKAGES,
    _backward,
    _forward,
    _module,
    attention,
    most_documents,
    reference,
)
from pgolf.ops.choose import Choice, choose, choose_all, obstacles, parse, with_attention
from pgolf.ops.testing import Call, kernel
from pgolf.ops.varlen import document_borders

from . import test_autocast, test_derivatives, test_operators
from .cases import small
from .flash_stand_ins import FAMILIES, MODULES

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend to have a GPU of some capability, or none, and packages, or what they raise."""

    real = importlib.import_module

    def forget() -> None:
        _module.cache_clear()
        choose.cache_clear()

    def pretend(capability: tuple | None, **packages: ModuleType | Exception) -> None:
        names = {package.module: packages.get(impl) for impl, package in PACKAGES.items()}

        def import_module(name: str, package: str | None = None) -> ModuleType:
            if name not in names:
                return real(name, package)
            found = names[name]
            if found is None:
                top = name.split(".")[0]
                raise ModuleNotFoundError(f"No module named {top!r}", name=top)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib, "import_module", import_module)
        if capability:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        forget()

    monkeypatch.delenv("PGOLF_OPS", raising=False)
    yield pretend
    forget()


def chosen(
    impl: str = "auto", dtype: torch.dtype = BF16, size: int = 64, device: str = "cuda",
    documents: bool = False,
) -> Choice:  # fmt: skip
    cannot = obstacles("attention", size=size, documents=documents)
    return choose("attention", impl, device, dtype, cannot=cannot)


HOPPER, AMPERE, ADA, BLACKWELL, TURING = (9, 0), (8, 0), (8, 9), (10, 0), (7, 5)
CONSUMER = (12, 0)  # Blackwell too, with other kernels
ALL = {
    "fa3": MODULES["fa3-plain"],
    "fa4": MODULES["fa4-plain"],
    "fa2": MODULES["fa2-operator"],
}


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [
        (HOPPER, "fa3 fa4 fa2", "fa3"),
        (HOPPER, "fa4 fa2", "fa4"),
        (HOPPER, "fa2", "fa2"),
        (HOPPER, "", "reference"),
        (AMPERE, "fa3 fa4 fa2", "fa2"),
        (ADA, "fa3 fa4 fa2", "fa2"),
        (BLACKWELL, "fa3 fa4 fa2", "fa4"),
        (BLACKWELL, "fa3 fa2", "fa2"),
        (BLACKWELL, "fa3", "reference"),
        (CONSUMER, "fa3 fa4 fa2", "fa2"),
        (TURING, "fa3 fa4 fa2", "reference"),
    ],
)
def test_order_of_choice(machine, capability, packages, expected) -> None:
    machine(capability, **{name: ALL[name] for name in packages.split()})
    impl, reason = chosen()
    assert impl == expected
    if expected == "reference":  # the slow path names everything it did without
        assert reason.startswith("torch's scaled_dot_product_attention; ")
        assert all(f"FlashAttention {n}" in reason for n in (2, 3, 4))
    else:
        assert f"FlashAttention {expected[-1]}" in reason


def test_missing_and_broken_packages_are_told_apart(machine) -> None:
    machine(HOPPER, fa2=ImportError("undefined symbol: _ZN3c105ErrorE"))
    impl, reason = chosen()
    assert impl == "reference"
    assert "FlashAttention 3: flash_attn_interface is not installed" in reason
    assert "fails to import" in reason and "undefined symbol: _ZN3c105ErrorE" in reason
    machine(HOPPER, fa3=OSError("libcudart.so.12: cannot open shared object file"))
    assert "libcudart.so.12" in chosen()[1]


@pytest.mark.parametrize(
    ("impl", "part"), [("fa2", "flash_attn_2_cuda"), ("fa4", "cutlass"), ("fa4", "flash_attn")]
)
def test_a_missing_part_of_a_package_is_named_with_the_remedy(machine, impl, part) -> None:
    machine(HOPPER, **{impl: ModuleNotFoundError(f"No module named {part!r}", name=part)})
    said = f"{part} is not installed ({PACKAGES[impl].remedy})"
    assert said in chosen().reason
    with pytest.raises(RuntimeError) as caught:
        chosen(impl)
    assert said in str(caught.value)


def test_what_flash_attn_cannot_take_goes_to_torch(machine) -> None:
    machine(HOPPER, **ALL)
    impl, reason = chosen(dtype=F32)
    assert impl == "reference" and "fa3 takes torch.bfloat16 and torch.float16, not" in reason
    assert chosen(dtype=F16).impl == "fa3"
    for size in (12, 264):
        impl, reason = chosen(size=size)
        assert impl == "reference" and reason.count(f"not {size}") == 3
    machine(BLACKWELL, **ALL)
    assert chosen(size=128).impl == "fa4" and chosen(size=136).impl == "fa2"
    with pytest.raises(ValueError, match="fa4: it takes at most 128 elements a head, not 136"):
        chosen("fa4", size=136)


def test_a_cpu_never_imports_flash_attn(machine) -> None:
    machine(HOPPER, **dict.fromkeys(ALL, AssertionError("imported")))
    said = "torch's scaled_dot_product_attention; varlen: it is for documents=true"
    assert chosen(device="cpu") == ("reference", said)
    assert chosen(device="cpu", documents=True).impl == "varlen"


@pytest.mark.parametrize(
    ("capability", "dtype", "wanted", "told"),
    [
        (HOPPER, BF16, "fa3", "not installed"),
        (HOPPER, BF16, "fa4", r"not installed \(pip install 'flash-attn-4"),
        (HOPPER, BF16, "fa2", "not installed"),
        (AMPERE, BF16, "fa3", "needs sm_90, this GPU is sm_80"),
        (AMPERE, BF16, "fa4", "needs sm_90 to sm_110, this GPU is sm_80"),
        (TURING, BF16, "fa2", "sm_75"),
        (HOPPER, F32, "fa3", "float32"),
    ],
)
def test_what_is_asked_for_and_cannot_run_is_an_error(
    machine, capability, dtype, wanted, told
) -> None:
    machine(capability)
    text = with_attention("", wanted)
    with pytest.raises(ConfigError, match=f"ops=attention={wanted}: .*{told}"):
        choose_all(text, "cuda", dtype, False, {}, ["attention"])
    with pytest.raises(ConfigError, match=f"{wanted} runs on cuda tensors, these are on cpu"):
        choose_all(text, "cpu", dtype, False, {}, ["attention"])


def test_what_is_asked_for_is_taken(machine, monkeypatch) -> None:
    machine(HOPPER, **ALL)
    assert chosen("fa2") == ("fa2", "as asked")
    assert parse("attention=sdpa") == parse("sdpa") == {"attention": "reference"}
    q, k, v = small(OPERATOR)[0].build(torch.device("cpu"), F32)[0]
    assert torch.equal(attention(q, k, v, "sdpa"), attention(q, k, v, "reference"))
    monkeypatch.setenv("PGOLF_OPS", "attention=fa4")
    assert chosen() == ("fa4", "PGOLF_OPS asks for it")


def test_the_setting_is_the_same_as_the_operator() -> None:
    assert with_attention("", "auto") == "" and with_attention("", "fa2") == "attention=fa2"
    assert parse(with_attention("reference,xsa=cpu", "fa4")) == parse(
        "reference,xsa=cpu,attention=fa4"
    )
    assert parse(with_attention("attention=reference", "sdpa"))["attention"] == "reference"
    for ops in ("attention=fa3", "xsa=cpu, attention=auto", "fa3", "xsa=cpu,sdpa"):
        with pytest.raises(ConfigError, match=f"attention=fa2 and ops={ops} name two: give one"):
            with_attention(ops, "fa2")


@pytest.mark.parametrize("impl", PACKAGES)
def test_a_version_that_is_too_old_is_not_used(machine, impl: str) -> None:
    """Before 2025 (FA3) and 2.7 (FA2) the second output is q, and window_size is required."""
    old = ModuleType(impl)
    setattr(old, PACKAGES[impl].forward, lambda q, k, v, softmax_scale, causal, window_size: None)
    machine(HOPPER, **{impl: old})
    found, reason = chosen()
    assert found == "reference" and "too old" in reason
    with pytest.raises(RuntimeError, match="too old"):
        chosen(impl)


# --- the arithmetic -------------------------------------------------------------------------------


def inputs(heads: int = 4, groups: int = 2, dtype: torch.dtype = F32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 5, n, 8, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1)])
def test_the_reference_is_causal_attention_with_grouped_heads(heads: int, groups: int) -> None:
    q, k, v = inputs(heads, groups, torch.float64)
    out = attention(q, k, v)
    for n in range(2):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(5):
                score = torch.stack([q[n, t, h] @ k[n, s, g] for s in range(t + 1)]) / math.sqrt(8)
                expected = torch.softmax(score, 0) @ v[n, : t + 1, g]
                torch.testing.assert_close(out[n, t, h], expected)


@pytest.fixture(params=FAMILIES)
def backend(request: pytest.FixtureRequest, machine, monkeypatch) -> str:
    """An implementation whose package is a stand-in of one family, on CPU tensors."""
    impl, *_ = FAMILIES[request.param]
    machine(None, **{impl: MODULES[request.param]})
    here = {"device": "cpu", "dtypes": (F32, BF16), "missing": lambda: _module(impl)[1]}
    changed = replace(OPERATOR.implementations[impl], **here)
    monkeypatch.setitem(OPERATOR.implementations, impl, changed)
    return impl


def test_the_rules_of_all_operators(backend: str) -> None:
    """Accuracy of packed inputs and any grouping, each gradient alone, autocast, transforms."""
    for sample in small(OPERATOR):
        for dtype in (F32, BF16):
            test_operators.test_accuracy(OPERATOR, backend, sample, dtype)
        test_operators.test_any_subset_of_gradients(OPERATOR, backend, sample)
        q, k, v = sample.build(torch.device("cpu"), BF16)[0]
        y, lse = _forward(q, k, v, None, backend)
        assert (y.shape, y.dtype, lse.dtype) == (q.shape, BF16, F32)
        assert lse.shape == (q.size(0), q.size(2), q.size(1))
    test_autocast.test_forward_under_autocast(OPERATOR, backend)
    test_autocast.test_backward_under_autocast(OPERATOR, backend, False)
    test_derivatives.test_second_derivatives_are_refused(OPERATOR, backend)
    with pytest.raises(RuntimeError, match=f"attention: impl={backend}: .*use impl='reference'"):
        torch.func.grad(lambda q: attention(q, q, q, backend).sum())(torch.ones(1, 2, 2, 8))


# Where documents begin in two sequences of 33 tokens: nowhere else, at the beginning, in the
# middle, in neighbouring places, at the end, everywhere.
STARTS = {
    "none": [], "first": [0, 33], "middle": [10, 40], "neighbours": [7, 8, 9, 50, 51],
    "last": [32, 65], "all": list(range(66)),
}  # fmt: skip


def documents(where: str, most: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    """(starts, borders) of two sequences of 33 tokens."""
    starts = torch.zeros(66, dtype=torch.bool)
    starts[STARTS[where]] = True
    return starts.view(2, 33), document_borders(starts.view(2, 33), most)


def check_documents(backend: str, where: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 33, 8, 16, generator=g).to(dtype).split((4, 2, 2), dim=2)
    for most in (5, 33) if where != "all" else (33,):
        borders = documents(where, most)[1]
        call = Call(reference, qkv, {"borders": borders}, differentiable=("q", "k", "v"))
        assert call.problem(kernel(OPERATOR, backend)) == "", most


@pytest.mark.parametrize("where", STARTS)
def test_documents_one_by_one(where: str) -> None:
    """The reference, and torch's kernel document by document, are attention of each alone."""
    starts, borders = documents(where)
    starts[:, 0] = True
    assert borders.dtype == torch.int32 and borders.shape == (67,)
    assert borders.unique().tolist() == [*starts.flatten().nonzero().flatten().tolist(), 66]
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(2, 33, 8, 16, generator=g).double().split((4, 2, 2), dim=2)
    for impl in ("reference", "varlen"):
        y = attention(q, k, v, impl, borders).flatten(0, 1)
        for a, b in pairwise(borders.unique().tolist()):
            own = [t.flatten(0, 1)[None, a:b] for t in (q, k, v)]
            torch.testing.assert_close(y[a:b], attention(*own, "reference")[0])
    for dtype in (F32, BF16, torch.float64):
        check_documents("varlen", where, dtype)


def test_documents_in_the_opaque_operators() -> None:
    """Schema, fakes, autograd and tracing with borders."""
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(2, 33, 8, 16, generator=g).split((4, 2, 2), dim=2)
    inputs = [t.contiguous() for t in (q, k, v)]
    borders = documents("neighbours")[1]
    y, lse = _forward(*inputs, borders, "varlen")
    torch.library.opcheck(_backward.overload, (y, *inputs, borders, y, lse, "varlen"))
    inputs = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(_forward.overload, (*inputs, borders, "varlen"))
    inputs = [t.detach()[:, :, :, :4].double().requires_grad_() for t in inputs]
    for impl in ("reference", "varlen"):
        run = lambda *qkv: attention(*qkv, impl, borders)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_documents_without_room_are_none() -> None:
    assert documents("neighbours", 3)[1].tolist() == [0, 7, 8, 33, 50, 51, 66]
    assert most_documents("fa3", 2048) == 64 == most_documents("fa2", 1024)
    assert most_documents("fa3", 8192) == 256 and most_documents("fa3", 33) == 33
    assert most_documents("varlen", 8192) == most_documents("reference", 8192) == 8192


def test_borders_of_another_kind_are_refused() -> None:
    q = torch.ones(1, 2, 2, 8)
    with pytest.raises(ValueError, match=r"borders is torch.int64 \(2,\): it has to be int32"):
        attention(q, q, q, borders=torch.tensor([0, 2]))


@pytest.mark.parametrize("where", STARTS)
def test_documents_in_a_package(backend: str, where: str) -> None:
    check_documents(backend, where, F32)


@pytest.mark.parametrize("backend", ["fa4-plain"], indirect=True)
def test_the_opaque_operators_obey_torch(backend: str) -> None:
    test_operators.test_opcheck(OPERATOR, backend)


def test_traces_in_one_graph(backend: str) -> None:
    call, run = Call.of(OPERATOR, small(OPERATOR)[0], F32), kernel(OPERATOR, backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: run(*a) * 1, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(call.run(compiled), call.run(run), strict=True):
        torch.testing.assert_close(mine, eager)


def test_a_whole_model_gives_the_same_loss(backend: str) -> None:
    config = ModelConfig(
        vocab_size=16, layers=2, dim=64, heads=4, kv_heads=2, mlp_hidden=16, table_dtype="fp32"
    )
    ids = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(0))
    losses = []
    for name in ("reference", backend):
        model = GPT(config, max_length=6, ops={"attention": name})
        init_weights(model, 0)
        torch.manual_seed(0)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.proj.weight)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append((loss, model.blocks[0].attn.c_v.weight.grad))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
