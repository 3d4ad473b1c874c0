"""A product that whoever adds it up multiplies: what it starts, keeps and refuses."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model import GPT
from pgolf.ops import leaky_relu2_mlp, linear_mix, residual_norm
from pgolf.ops.choose import choose
from pgolf.ops.compile import Recorder
from pgolf.ops.factored import Factored
from pgolf.ops.joined_norm import joined_norm
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import deferred
from pgolf.ops.product import Product
from pgolf.ops.residual_norm import sums_of
from pgolf.ops.testing import Call
from pgolf.triton_kernels import gemm

from ..model.published import PUBLISHED, small
from ..model.test_forms import attend_as_flash_attention, batch, loss_and_gradients
from ..model.test_gpt_spec import TIME, randomised
from ..triton.interpreter import repair
from .cases import implementations
from .test_linear_residual import Started

repair()

BF16, FP32 = torch.bfloat16, torch.float32
KERNEL = "linear_residual_tma"
OPERATOR = OPERATORS["linear_mix"]
NORMS = implementations(OPERATORS["residual_norm"])
here = pytest.mark.skipif(
    "triton" not in implementations(OPERATOR) or not NORMS, reason="no interpreter here"
)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("factored", [False, True])
def test_the_reference_and_auto_are_two_steps_in_the_open(factored: bool) -> None:
    """By the operator `residual_norm` as it is named, to the bit, and no operator of its own."""
    z, w, x, x0 = tensors((2, 3, 64), (32, 64), (2, 3, 32), (2, 3, 32), dtype=FP32)
    (mix,) = tensors((2, 32), dtype=FP32)
    for impl, named, step in (
        ("reference", None, "reference"), ("auto", None, "auto"), ("auto", "reference", "reference")
    ):  # fmt: skip
        how = {"scale": 0.5, "eps": 0.1, "factored": factored}
        with Recorder() as recorder:
            x_in, h = linear_mix(z, w, x, x0, mix, impl=impl, norm_impl=named, **how)
        names = {call[0]._schema.name for call in recorder.calls}
        assert names <= {"pgolf::residual_norm"} and bool(names) == (step == "auto" and bool(NORMS))
        wanted, normed = residual_norm(x, branch=F.linear(z, w), x0=x0, mix=mix, impl=step, **how)
        h, normed = (t.product() if factored else t for t in (h, normed))
        assert torch.equal(x_in, wanted) and torch.equal(h, normed)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_waits_for_a_gpu(device: str, compiled: bool) -> None:
    choice = choose("linear_mix", "auto", device, BF16, compiled)
    assert choice.impl == "reference" and "torch's matmul, then" in choice.reason


@here
@pytest.mark.parametrize("form", ["plain", "mix", "total", "skip", "skip without mix"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_with_the_norm_in_plain_torch(dtype: torch.dtype, form: str) -> None:
    """As where there are kernels of Triton alone: the GEMM, and all gradients."""
    sample = next(s for s in OPERATOR.samples() if s.label == form)
    call = Call.of(OPERATOR, sample, dtype)

    def run(*args: Tensor, **named: object) -> tuple[Tensor, ...]:
        *others, h = linear_mix(*args, **named, impl="triton", norm_impl="reference")
        return (*others, h.product())

    with Started() as started:
        assert call.problem(run) == ""
    readable = dtype == BF16 and call.arguments["z"].size(-1) % 8 == 0
    assert started == [KERNEL] * readable * len(started) and bool(started) == readable


@here
def test_one_launch_and_neither_product_nor_branch_is_kept() -> None:
    call = Call.of(OPERATOR, OPERATOR.samples()[2], BF16, contiguous=True)
    kept, leaves = [], call.leaves()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        Started() as started,
    ):
        total, x_in, h = call.on(functools.partial(linear_mix, impl="triton"), *leaves)
    assert started == [KERNEL]
    known = {t.data_ptr() for t in leaves}
    assert {t.data_ptr() for t in kept} - known == {
        t.data_ptr() for t in (total, x_in, h.factor)
    }  # fmt: skip


def check(run: Callable, given: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Results and gradients by a product, not worse than by two steps of that dtype.

    Args:
        run: (as_product, *leaves) -> results, of which the last is not differentiated.
        given: leaves; factors, which have one dimension, or two rows, stay in float32.
    """
    g = torch.Generator().manual_seed(1)

    def made(as_product: bool, of: torch.dtype) -> list[Tensor]:
        leaves = [t if t.dtype == FP32 and of == BF16 else t.to(of) for t in given]
        leaves = [t.clone().requires_grad_() for t in leaves]
        with Started() as started:
            results = run(as_product, *leaves)
        assert started == [KERNEL] * (as_product and of == BF16)
        upstream = [torch.randn(t.shape, generator=g.manual_seed(1)).to(t) for t in results[:-1]]
        return [*results, *torch.autograd.grad(results[:-1], leaves, upstream)]

    ours, usual, truth = made(True, dtype), made(False, dtype), made(False, torch.float64)
    for mine, plain, exact in zip(ours, usual, truth, strict=True):
        floor = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 3 * (plain - exact).abs().max() + floor


@here
@pytest.mark.parametrize("states", [1, 2, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_joined_layers_multiply_a_product(states: int, dtype: torch.dtype) -> None:
    """All terms, and the factors of the product, get what they would in two steps."""

    def run(as_product: bool, z: Tensor, w: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        wide = torch.float64 if z.dtype == torch.float64 else FP32
        factors = [t.to(wide) for t in tensors(*[(32,)] * states, dtype=FP32)]
        branch = Product(z, w) if as_product else F.linear(z, w)
        x_in, h = joined_norm(
            [branch, *terms], [None, *factors], scale=0.5, eps=0.1, linear="triton"
        )
        return x_in, h.y, h.factor

    check(run, tensors((2, 9, 40), (32, 40), *[(2, 9, 32)] * states, dtype=dtype), dtype)


@here
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_total_that_goes_on_as_a_product(dtype: torch.dtype) -> None:
    """As in a layer whose sum is a later layer's skip: sums of gradients come later."""
    (x0,) = tensors((2, 70, 32), dtype=FP32)

    def run(as_product: bool, z: Tensor, w: Tensor, x: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
        mix, factor = of
        own = sums_of(140, mix=mix, total_scale=factor, x0_is_product=True)
        (sums,) = deferred([own], "auto")
        branch = Product(z, w) if as_product else F.linear(z, w)
        total, x_in, h = residual_norm(
            x, branch=branch, x0=x0.to(x.dtype), mix=mix, total_scale=factor, x0_is_product=True,
            keep_total=True, factored=True, sums=sums, eps=0.1, linear="triton",
        )  # fmt: skip
        return total, x_in, h.y, h.factor

    states = tensors((2, 70, 40), (32, 40), (2, 70, 32), dtype=dtype)
    check(run, [*states, *tensors((2, 32), (32,), dtype=FP32)], dtype)


@here
@pytest.mark.parametrize("mlp", [*implementations(OPERATORS["leaky_relu2_mlp"]), "reference"])
def test_behind_the_mlp(mlp: str) -> None:
    """The gradient of a product goes to its ticket, and from there on as that of the MLP would."""
    given = tensors((2, 9, 32), (48, 32), (32, 48), (2, 9, 32))

    def run(h: Tensor, up: Tensor, down: Tensor, x: Tensor, ours: bool = True) -> tuple:
        if not ours:
            return residual_norm(x, branch=leaky_relu2_mlp(h, up, down, impl="reference"))
        product = leaky_relu2_mlp(h, up, down, impl=mlp, as_product=True)
        assert (product.out is None) == (mlp == "reference") and product.z.shape == (2, 9, 48)
        x_in, normed = residual_norm(x, branch=product, factored=True, linear="triton")
        return x_in, normed.product()

    call = Call(
        lambda h, up, down, x: run(h, up, down, x, ours=False), given,
        differentiable=("h", "up", "down", "x"), contiguous=True,
    )  # fmt: skip
    with Started() as started:
        assert call.problem(run) == ""
    assert started.count(KERNEL) == 1


PRODUCT = Product(torch.ones(2, 3, 64), torch.ones(32, 64))


@here
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(())}, r"a product of z \(\) and w \(32, 64\): for x \(2, 3, 32\) they"),
        ({"z": torch.ones(3, 64)}, r"they have to be \(2, 3, K\) and \(32, K\)"),
        ({"w": torch.ones(31, 64)}, r"z \(2, 3, 64\) and w \(31, 64\)"),
        ({"w": torch.ones(32, 63)}, r"w \(32, 63\): for x \(2, 3, 32\)"),
        ({"out": torch.ones(2, 32)}, r"ticket is \(2, 32\): it has to be \(2, 3, 32\)"),
        ({"w": torch.ones(32, 64, dtype=BF16)}, "w is torch.bfloat16 and x is torch.float32"),
        ({"w": torch.ones(32, 64, device="meta")}, "w is on meta and x on cpu: move one"),
    ],
)
def test_products_that_are_refused(change: dict, message: str) -> None:
    x, product = torch.ones(2, 3, 32), PRODUCT._replace(**change)
    with pytest.raises(ValueError, match=f"^residual_norm: .*{message}"):
        residual_norm(x, branch=product, linear="triton")
    with pytest.raises(ValueError, match=f"^joined_norm: .*{message}"):
        joined_norm([product, x], [None, torch.ones(32)], linear="triton")


@here
def test_who_takes_products() -> None:
    x, scale = torch.ones(2, 3, 32), torch.ones(32)
    with pytest.raises(ValueError, match="branch_scale of a Product: multiply w's rows by it"):
        residual_norm(x, branch=PRODUCT, branch_scale=scale)
    for terms, factors in (([PRODUCT], [scale]), ([x, PRODUCT], [None, scale])):
        with pytest.raises(ValueError, match="only the first of several terms may be a Product"):
            joined_norm(terms, factors)
    with pytest.raises(ValueError, match="linear_mix: impl=cuda: there is no 'cuda'"):
        residual_norm(x, branch=PRODUCT, linear="cuda")
    plain = residual_norm(x, branch=PRODUCT, impl="reference", linear="triton")
    assert torch.equal(plain[1], residual_norm(x, branch=x + 63, impl="reference")[1])
    with pytest.raises(ValueError, match="impl=triton: it takes at most 4096 elements a row"):
        linear_mix(torch.ones(1, 2), torch.ones(4097, 2), torch.ones(1, 4097), impl="triton")
    x_in, _ = residual_norm(x.requires_grad_(), branch=PRODUCT, linear="triton")
    (dx,) = torch.autograd.grad(x_in.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm: its kernels have first derivatives"):
        torch.autograd.grad(dx.sum(), x)


@here
@pytest.mark.parametrize("linear", ["triton", "reference"])
def test_autocast_stays_out_of_products(linear: str) -> None:
    """A kernel would read a product in bf16 as one in fp32."""
    z, w, x = tensors((4, 48), (32, 48), (4, 32), dtype=FP32)
    for run in (
        lambda: residual_norm(x, branch=Product(z, w), factored=True, linear=linear),
        lambda: joined_norm([Product(z, w), x], [None, torch.ones(32)], linear=linear),
    ):
        wanted, normed = run()
        with torch.autocast("cpu", BF16):
            x_in, h = run()
        assert torch.equal(x_in, wanted) and torch.equal(h.product(), normed.product())


@here
def test_products_of_one_row_and_of_none() -> None:
    z, w, x, x0 = tensors((48,), (32, 48), (32,), (32,))
    (mix,) = tensors((2, 32), dtype=FP32)
    one = linear_mix(z, w, x, x0, mix, factored=True, impl="triton")
    rows = linear_mix(z[None], w, x[None], x0[None], mix, factored=True, impl="triton")
    assert torch.equal(one[0], rows[0][0]) and torch.equal(one[1].factor, rows[1].factor[0])
    up, down, none = *tensors((48, 32), (32, 48)), torch.empty(0, 32, dtype=BF16)
    for mlp in implementations(OPERATORS["leaky_relu2_mlp"]):
        product = leaky_relu2_mlp(none, up, down, impl=mlp, as_product=True)
        assert product.z.shape == (0, 48) and product.out.shape == (0, 32)


# --- in a model -----------------------------------------------------------------------------------

# Recipe, kernels beside it, launches of the GEMM in three layers (the last norm writes its h), and
# whether it is compiled.
MODELS = [
    ("pr1473", "none", 0, False), ("pr1473", "not joined", 2, False),
    ("pr1473", "joined", 2, False), ("pr1473", "joined", 2, True), ("pr478", "joined", 2, False),
    ("pr531", "joined", 2, False), ("pr543", "joined", 2, False),
]  # fmt: skip


@here
@pytest.mark.parametrize(("recipe", "kernels", "launches", "compiled"), MODELS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_model_on_it_is_the_model_without(
    dtype: torch.dtype, recipe: str, kernels: str, launches: int, compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Loss and every gradient; in fp32 by the matmul and the row kernel in its place."""
    attend_as_flash_attention(monkeypatch)
    config = small(
        PUBLISHED[recipe], layers=3, ve_layers="0", xsa_layers="1", dim=64, mlp_hidden=96
    )
    model = randomised(config, FP32)
    others = {} if kernels == "none" else {
        n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations
    }  # fmt: skip
    if kernels == "not joined":
        others["scaled_copies"] = "reference"
    found = []
    for impl in ("reference", "triton"):
        ops = {**others, "linear_mix": impl}
        twin = GPT(config, dtype, max_length=TIME, ops=ops)
        twin.load_state_dict(model.state_dict())
        if compiled:
            torch._dynamo.reset()
            twin.forward = torch.compile(twin.forward, fullgraph=True, backend="aot_eager")
        with Started() as started:
            loss, gradients = loss_and_gradients(twin)
        found.append([loss, *gradients])
    assert started == [KERNEL] * launches * (dtype == BF16)
    rtol, atol = (0.1, 0.02) if dtype == BF16 else (1e-4, 1e-4)
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol * plain.abs().max().item())


@here
def test_a_layer_whose_state_is_added_up_at_once() -> None:
    """What `backout` takes away is the sum, which somebody has to multiply out."""
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="0", xsa_layers="1", dim=64,
                   backout=True)  # fmt: skip
    model = randomised(config, FP32)
    kernels = {n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations}
    found = []
    for impl in ("reference", "triton"):
        twin = GPT(config, FP32, max_length=TIME, ops={**kernels, "linear_mix": impl})
        twin.load_state_dict(model.state_dict())
        loss, gradients = loss_and_gradients(twin)
        found.append([loss, *gradients])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@here
def test_under_autocast_a_model_takes_two_steps() -> None:
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="0", xsa_layers="1", dim=64)
    model = randomised(config, FP32)
    kernels = {"residual_norm": "cpu", "linear_mix": "triton"}
    twin = GPT(config, FP32, max_length=TIME, ops=kernels)
    plain = GPT(config, FP32, max_length=TIME, ops={**kernels, "linear_mix": "reference"})
    for of in (twin, plain):
        of.load_state_dict(model.state_dict())
    with torch.autocast("cpu", BF16), Started() as started:
        loss, wanted = (m(*batch(config)) for m in (twin, plain))
    assert started == [] and torch.equal(loss, wanted)


@here
def test_without_tma_it_is_two_steps(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "device_obstacle", lambda device: "it has none")
    z, w, x = tensors((2, 9, 40), (32, 40), (2, 9, 32))
    with Started() as started:
        x_in, h = linear_mix(z, w, x, factored=True, impl="triton")
    wanted, normed = residual_norm(x, branch=z @ w.t(), factored=True)
    assert started == [] and torch.equal(x_in, wanted)
    assert isinstance(h, Factored) and torch.equal(h.factor, normed.factor)
