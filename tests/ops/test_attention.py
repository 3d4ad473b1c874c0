"""Attention: the arithmetic, the choice of backend, and the flash-attn operators on stand-ins."""

import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from pgolf.config import ModelConfig
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.ops import attention as module
from pgolf.ops.attention import attention, choose

from .flash_stand_ins import FAMILIES, MODULES

FA3, FA2 = "flash_attn_interface", "flash_attn.flash_attn_interface"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend to have a GPU of some capability and some packages: modules, or errors to raise."""

    real = importlib.import_module

    def pretend(capability: tuple[int, int], **packages: ModuleType | Exception) -> None:
        names = {FA3: packages.get("fa3"), FA2: packages.get("fa2")}

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
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        module._module.cache_clear()

    yield pretend
    module._module.cache_clear()


HOPPER, AMPERE, ADA, BLACKWELL, TURING = (9, 0), (8, 0), (8, 9), (10, 0), (7, 5)
BOTH = {"fa3": MODULES["fa3-plain"], "fa2": MODULES["fa2-operator"]}


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [
        (HOPPER, ("fa3", "fa2"), "fa3"),
        (HOPPER, ("fa2",), "fa2"),
        (HOPPER, (), "sdpa"),
        (AMPERE, ("fa3", "fa2"), "fa2"),
        (ADA, ("fa3", "fa2"), "fa2"),
        (BLACKWELL, ("fa3", "fa2"), "fa2"),
        (BLACKWELL, ("fa3",), "sdpa"),
        (TURING, ("fa3", "fa2"), "sdpa"),
    ],
)
def test_order_of_choice(machine, capability, packages, expected) -> None:
    machine(capability, **{name: BOTH[name] for name in packages})
    backend, reason = choose(CUDA, BF16)
    assert backend == expected
    if expected == "sdpa":  # the slow path names everything it did without
        assert "scaled_dot_product_attention" in reason
        assert "FlashAttention 3" in reason and "FlashAttention 2" in reason
    else:
        assert f"FlashAttention {expected[-1]}" in reason


def test_missing_and_broken_packages_are_told_apart(machine) -> None:
    machine(HOPPER, fa2=ImportError("undefined symbol: _ZN3c105ErrorE"))
    backend, reason = choose(CUDA, BF16)
    assert backend == "sdpa"
    assert "FlashAttention 3: flash_attn_interface is not installed" in reason
    assert "fails to import" in reason and "undefined symbol: _ZN3c105ErrorE" in reason
    machine(HOPPER, fa3=OSError("libcudart.so.12: cannot open shared object file"))
    assert "libcudart.so.12" in choose(CUDA, BF16)[1]


def test_a_missing_part_of_a_package_is_named(machine) -> None:
    error = ModuleNotFoundError("No module named 'flash_attn_2_cuda'", name="flash_attn_2_cuda")
    machine(AMPERE, fa2=error)
    assert "flash_attn_2_cuda is not installed" in choose(CUDA, BF16)[1]


def test_reasons_name_device_and_architecture(machine) -> None:
    machine(BLACKWELL, **BOTH)
    assert "sm_90" in choose(CUDA, torch.float32)[1] and "sm_100" in choose(CUDA, torch.float32)[1]
    assert "this run is on cpu" in choose(CPU, BF16)[1]


def test_fp32_goes_to_sdpa(machine) -> None:
    machine(HOPPER, **BOTH)
    backend, reason = choose(CUDA, torch.float32)
    assert backend == "sdpa" and "torch.float32" in reason
    assert choose(CUDA, torch.float16)[0] == "fa3"


def test_cpu_never_imports_flash_attn(machine) -> None:
    machine(HOPPER, fa3=AssertionError("imported"), fa2=AssertionError("imported"))
    assert choose(CPU, BF16)[0] == "sdpa"


@pytest.mark.parametrize(
    ("capability", "dtype", "wanted", "told"),
    [
        (HOPPER, BF16, "fa3", "not installed"),
        (HOPPER, BF16, "fa2", "not installed"),
        (AMPERE, BF16, "fa3", "sm_80"),
        (TURING, BF16, "fa2", "sm_75"),
        (HOPPER, torch.float32, "fa3", "float32"),
    ],
)
def test_a_wanted_backend_that_cannot_run_is_an_error(
    machine, capability, dtype, wanted, told
) -> None:
    machine(capability)
    with pytest.raises(ConfigError, match=told):
        choose(CUDA, dtype, wanted)
    with pytest.raises(ConfigError, match="this run is on cpu"):
        choose(CPU, dtype, wanted)


def test_a_wanted_backend_is_taken(machine) -> None:
    machine(HOPPER, **BOTH)
    assert choose(CUDA, BF16, "fa2")[0] == "fa2"
    assert choose(CUDA, BF16, "sdpa")[0] == "sdpa"


def inputs(
    heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 5, n, 8, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1)])
def test_sdpa_is_causal_attention_with_grouped_heads(heads: int, groups: int) -> None:
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
def backend(request: pytest.FixtureRequest, machine) -> str:
    """A flash-attn backend whose package is a stand-in of one family."""
    name, *_ = FAMILIES[request.param]
    machine(HOPPER, **{name: MODULES[request.param]})
    return name


def gradients(
    function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    # gradients may come strided
    strided = torch.stack((upstream, upstream), -1)[..., 0].to(out.dtype)
    return out, torch.autograd.grad(out, leaves, strided)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_values_and_gradients_are_those_of_sdpa(backend: str, groups: int) -> None:
    leaves = inputs(4, groups)
    out, grads = gradients(lambda *a: attention(*a, backend), leaves)
    expected, expected_grads = gradients(attention, leaves)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_bf16_stays_bf16(backend: str) -> None:
    leaves = inputs(dtype=BF16)
    out, grads = gradients(lambda *a: attention(*a, backend), leaves)
    assert {t.dtype for t in (out, *grads)} == {BF16}
    exact, _ = gradients(attention, [t.detach().double().requires_grad_() for t in leaves])
    assert (out.double() - exact).abs().max() < 0.03


def test_inputs_that_are_slices_of_one_matmul(backend: str) -> None:
    packed = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:]
    torch.testing.assert_close(attention(q, k, v, backend), attention(q, k, v))


def test_traces_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: attention(*a, backend) * 2, fullgraph=True, backend="aot_eager"
    )
    leaves = inputs()
    out, grads = gradients(compiled, leaves)
    expected, expected_grads = gradients(lambda *a: attention(*a, backend) * 2, leaves)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_operators_obey_torch(backend: str) -> None:
    leaves = inputs()
    forward = getattr(torch.ops.pgolf, f"attention_{backend}")
    torch.library.opcheck(forward.default, leaves)
    with torch.no_grad():
        out, lse = forward(*leaves)
    assert lse.shape == (2, 4, 5) and lse.dtype is torch.float32
    backward = getattr(torch.ops.pgolf, f"attention_{backend}_backward")
    arguments = [t.detach() for t in (torch.randn_like(out), *leaves, out, lse)]
    torch.library.opcheck(backward.default, arguments)


def test_a_whole_model_gives_the_same_loss(backend: str) -> None:
    config = ModelConfig(
        vocab_size=16, layers=2, dim=64, heads=4, kv_heads=2, mlp_hidden=16, table_dtype="fp32"
    )
    ids = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(0))
    losses = []
    for name in ("sdpa", backend):
        model = GPT(config, backend=name, max_length=6)
        init_weights(model, 0)
        torch.manual_seed(0)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.proj.weight)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append((loss, model.blocks[0].attn.c_v.weight.grad))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fa3", "fa2"])
def test_a_version_that_is_too_old_is_not_used(machine, name: str) -> None:
    """Before 2025 (FA3) and 2.7 (FA2) the second output is q, and window_size is required."""
    old = ModuleType(name)
    old._flash_attn_forward = lambda q, k, v, softmax_scale, causal, window_size: None
    machine(HOPPER, **{name: old})
    backend, reason = choose(CUDA, BF16)
    assert backend == "sdpa" and "too old" in reason
    with pytest.raises(ConfigError, match="too old"):
        choose(CUDA, BF16, name)



@pytest.mark.parametrize("head_dim", [12, 264])
def test_head_sizes_that_flash_attn_cannot_take(machine, head_dim: int) -> None:
    machine(HOPPER, **BOTH)
    backend, reason = choose(CUDA, BF16, head_dim=head_dim)
    assert backend == "sdpa" and f"these are {head_dim}" in reason
