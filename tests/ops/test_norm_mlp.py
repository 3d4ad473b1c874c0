"""The MLP with the norm before it: what it starts, keeps and refuses."""

import pytest
import torch
from torch import Tensor

from pgolf.model import GPT
from pgolf.ops import leaky_relu2_mlp, linear_residual, norm_mlp, residual_norm
from pgolf.ops.choose import choose
from pgolf.ops.compile import Recorder
from pgolf.ops.norm_mlp import PART, sums_of
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import deferred
from pgolf.ops.product import Product
from pgolf.ops.residual_norm import sums_of as sums_of_norm
from pgolf.ops.testing import Call

from ..model.published import PUBLISHED, small
from ..model.test_forms import attend_as_flash_attention, batch, loss_and_gradients
from ..model.test_gpt_spec import TIME, randomised
from ..triton.interpreter import repair
from .cases import implementations
from .test_cost import Traffic
from .test_linear_residual import Started

repair()

BF16, FP32 = torch.bfloat16, torch.float32
OPERATOR = OPERATORS["norm_mlp"]
here = pytest.mark.skipif("triton" not in implementations(OPERATOR), reason="no interpreter here")
FORWARD = ["leaky_relu2_up_tma"]
BACKWARD = ["leaky_relu2_dgrad_tma", "norm_mlp_dgrad_tma"]


def inputs(dtype: torch.dtype = FP32, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, w_up, w_down"""
    g = torch.Generator().manual_seed(0)
    shapes = (2, tokens, 32), (96, 32), (32, 96)
    return tuple(torch.randn(shape, generator=g).mul(0.3).to(dtype) for shape in shapes)


def two_steps(
    x: Tensor, w_up: Tensor, w_down: Tensor, scale: float = 1.0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """By both operators in plain torch."""
    x, h = residual_norm(x, scale=scale, eps=eps, impl="reference")
    return x, leaky_relu2_mlp(h, w_up, w_down, impl="reference")


def test_the_reference_and_auto_are_two_steps_in_the_open() -> None:
    """By the operators as they are named, to the bit, and no operator of its own."""
    given, how = inputs(), {"scale": 0.5, "eps": 0.1}
    for impl, named, step in (
        ("reference", None, "reference"), ("auto", None, "cpu"), ("auto", "reference", "reference")
    ):  # fmt: skip
        with Recorder() as recorder:
            found = norm_mlp(*given, impl=impl, mlp_impl=named, norm_impl=named, **how)
        names = {call[0]._schema.name for call in recorder.calls}
        wanted = {"pgolf::residual_norm", "pgolf::leaky_relu2_mlp"} if step == "cpu" else set()
        assert names == wanted
        if step == "reference":
            assert all(map(torch.equal, found, two_steps(*given, **how)))
        else:
            torch.testing.assert_close(found, two_steps(*given, **how))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_waits_for_a_gpu(device: str, compiled: bool) -> None:
    choice = choose("norm_mlp", "auto", device, BF16, compiled)
    assert choice.impl == "reference" and "then `leaky_relu2_mlp`" in choice.reason


@here
@pytest.mark.parametrize("as_product", [False, True])
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("norm_impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_results_and_gradients(
    dtype: torch.dtype, norm_impl: str, factor: bool, as_product: bool
) -> None:
    """With the factor from before or from x; in fp32 without the GEMM, by kernels or in torch."""

    def run(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        known = None
        if factor:
            known = -0.5 * (x.detach().float().square().mean(-1) + 0.1).rsqrt()
        x, out = norm_mlp(
            x, up, down, scale=-0.5, eps=0.1, factor=known, as_product=as_product, impl="triton",
            norm_impl=norm_impl,
        )  # fmt: skip
        assert isinstance(out, Product) == as_product
        return x, out.multiplied() if as_product else out

    call = Call(
        lambda x, w_up, w_down: two_steps(x, w_up, w_down, scale=-0.5, eps=0.1), inputs(dtype),
        differentiable=("x", "w_up", "w_down"),
    )  # fmt: skip
    with Started() as started:
        assert call.problem(run) == ""
    pointers = ["leaky_relu2_up", "leaky_relu2_dgrad"]
    assert started == (FORWARD + BACKWARD if dtype == BF16 else pointers)


@here
def test_launches_and_what_is_kept() -> None:
    """Two forward, by a matmul of torch, three backward, by one for each weight."""
    x, up, down = leaves = [t.to(BF16).requires_grad_() for t in inputs()]
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        (traffic := Traffic()).counted(),
    ):
        through, out = norm_mlp(*leaves, impl="triton")
    assert traffic.kernels == set(FORWARD) and traffic.launches == 1
    assert through.data_ptr() == x.data_ptr()  # handed on, not copied
    known = {t.data_ptr() for t in leaves}
    sizes = [t.shape for t in kept if t.data_ptr() not in known]
    assert sizes == [(2, 3), (6, 96), (6, 3)]  # the factor, post, signs
    with (traffic := Traffic()).counted():
        torch.autograd.grad([through, out], leaves, [through, out])
    assert traffic.kernels == set(BACKWARD) and traffic.launches == 2


@here
def test_least_bytes_are_those_that_are_touched() -> None:
    """By both GEMMs and torch's, but for parts of the products of rows that are known between."""
    call = Call.of(OPERATOR, OPERATOR.samples()[0], BF16, contiguous=True)
    leaves = call.leaves()
    forward, backward = OPERATOR.cost(**call.arguments)
    with (traffic := Traffic()).counted():
        results = norm_mlp(*leaves, scale=0.5, impl="triton")
    assert (traffic.read, traffic.written) == (forward.read, forward.written)
    with (traffic := Traffic()).counted():
        torch.autograd.grad(results, leaves, [t.clone() for t in results])
    dots = 4 * leaves[0].size(1)
    assert (traffic.read, traffic.written) == (backward.read + dots, backward.written + dots)


@here
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_each_gradient_alone(dtype: torch.dtype) -> None:
    """Whichever results are used, and whichever arguments learn."""
    given = inputs(dtype)
    for used in ((0,), (1,), (0, 1)):
        for learns in ((0,), (1,), (2,), (0, 1, 2)):
            if used == (0,) and learns != (0,):
                continue
            found = []
            for impl in ("reference", "triton"):
                leaves = [t.clone().requires_grad_(i in learns) for i, t in enumerate(given)]
                with Started() as started:
                    results = norm_mlp(*leaves, eps=0.1, impl=impl)
                    loss = sum((results[i].float() * (i + given[0])).sum() for i in used)
                    found.append(torch.autograd.grad(loss, [leaves[i] for i in learns]))
            if learns == (2,):  # of w_down alone no kernel is needed
                assert len(started) == 1
            for plain, ours in zip(*found, strict=True):
                torch.testing.assert_close(
                    ours, plain, rtol=0.02 if dtype == BF16 else 1e-4,
                    atol=(0.02 if dtype == BF16 else 1e-5) * plain.abs().max().item(),
                )  # fmt: skip


@here
@pytest.mark.parametrize("norm_impl", ["auto", "reference"])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_state_that_goes_on_as_a_product(
    dtype: torch.dtype, later: bool, norm_impl: str
) -> None:
    """x_in_scale's gradient, from here or later, is that of the product; in several parts."""
    tokens = PART
    given, factor = inputs(dtype, tokens), torch.linspace(-1, 2, 32)
    leaves = [t.clone().requires_grad_() for t in (*given, factor)]
    upstream = [torch.sin(given[0]), torch.cos(given[0])]
    x, out = two_steps(*leaves[:3], scale=0.5)
    wanted = torch.autograd.grad([(leaves[3] * x).to(dtype), out], leaves, upstream)
    sums = None
    if later:
        own = sums_of(2 * tokens, leaves[3])
        assert own.parts == 2
        (sums,) = deferred([own], "auto")
    x, out = norm_mlp(
        *leaves[:3], scale=0.5, x_in_scale=leaves[3], sums=sums, impl="triton", norm_impl=norm_impl
    )
    found = torch.autograd.grad([x, out], leaves, upstream)
    for plain, ours in zip(wanted, found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(
            ours, plain, rtol=0.05 if dtype == BF16 else 1e-4,
            atol=(0.02 if dtype == BF16 else 1e-5) * plain.abs().max().item(),
        )  # fmt: skip


@here
@pytest.mark.parametrize("before", ["residual_norm", "linear_residual"])
def test_the_norm_before_it_only_hands_on(before: str) -> None:
    """Its backward kernel does not start, and all that was added there has one gradient."""
    g = torch.Generator().manual_seed(1)
    x, up, down = inputs(BF16)
    z, w = (torch.randn(shape, generator=g).to(BF16) for shape in ((2, 3, 64), (32, 64)))

    def run(z: Tensor, w: Tensor, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        if before == "residual_norm":
            x, h = residual_norm(x, branch=z @ w.t(), factored=True, impl="cpu")
        else:
            x, h = linear_residual(z, w, x, factored=True, impl="triton", norm_impl="cpu")
        return norm_mlp(x, up, down, factor=h.factor, impl="triton")

    def plain(z: Tensor, w: Tensor, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return two_steps(x + z @ w.t(), up, down)

    call = Call(plain, (z, w, x, up, down), differentiable=("z", "w", "x", "up", "down"))
    with Recorder() as recorder:
        assert call.problem(run) == ""
    names = {call[0]._schema.name for call in recorder.calls}
    assert names - {"pgolf::product"} == {
        "pgolf::residual_norm", "pgolf::norm_mlp", "pgolf::norm_mlp_backward"
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(())}, "the input has no dimensions"),
        ({"w_up": torch.ones(96)}, "w_up is (96,): it has to be (F, D)"),
        ({"w_up": torch.ones(96, 31)}, "w_up is (96, 31): with x (2, 3, 32) and 96 hidden units"),
        ({"w_down": torch.ones(31, 96)}, "w_down is (31, 96): with x (2, 3, 32)"),
        ({"factor": torch.ones(2)}, "factor is (2,): for these rows it has to be (2, 3)"),
        ({"factor": torch.ones(2, 3).double()}, "factor is torch.float64: it has to be torch.fl"),
        ({"w_up": torch.ones(96, 32, dtype=BF16)}, "w_up is torch.bfloat16 and x is torch.float32"),
        ({"slope": 2.0}, "slope=2.0: it has to be 0 (relu^2) to 1"),
        ({"scale": 0.0}, "scale=0.0: it has to be finite and not 0"),
        ({"eps": -1.0}, "eps=-1.0: it has to be 0 or more, and finite"),
        ({"x_in_scale": torch.ones(25)}, "x_in_scale is torch.float32 (25,) on cpu"),
    ],
)
def test_refused(change: dict, message: str, impl: str) -> None:
    arguments = dict(zip(("x", "w_up", "w_down"), inputs(), strict=True)) | change
    with pytest.raises(ValueError) as caught:
        norm_mlp(**arguments, impl=impl)
    assert str(caught.value).startswith("norm_mlp: ") and message in str(caught.value)


@here
def test_refused_by_kernels_and_by_the_reference() -> None:
    given = inputs()
    with pytest.raises(ValueError, match="norm_mlp: impl=cuda: there is no 'cuda'"):
        norm_mlp(*given, impl="cuda")
    wide = torch.ones(1, 4097), torch.ones(2, 4097), torch.ones(4097, 2)
    with pytest.raises(ValueError, match="impl=triton: it takes at most 4096 elements a row"):
        norm_mlp(*wide, impl="triton")
    with pytest.raises(ValueError, match=r"sums is \(2, 32\): .* has to be \(1, 32\)"):
        norm_mlp(*given, x_in_scale=torch.ones(32), sums=torch.ones(2, 32), impl="triton")
    for name in ("x_in_scale", "sums"):
        with pytest.raises(ValueError, match="impl=reference takes no products"):
            norm_mlp(*given, **{name: torch.ones(32)}, impl="reference")
    given[0].requires_grad_()
    (dx,) = torch.autograd.grad(
        norm_mlp(*given, impl="triton")[1].sum(), given[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="norm_mlp: its kernels have first derivatives only"):
        torch.autograd.grad(dx.sum(), given[0])


KERNELS = {
    "none": {},
    "not joined": {"scaled_copies": "reference"},
    "joined": {},
    "epilogues": {n: "triton" for n in ("xsa_linear", "linear_residual", "linear_mix")},
}


@here
@pytest.mark.parametrize(
    ("recipe", "kernels", "compiled"),
    [
        *((recipe, "joined", False) for recipe in PUBLISHED),
        *(("pr1473", kernels, False) for kernels in KERNELS if kernels != "joined"),
        ("pr1473", "joined", True), ("pr478", "not joined", True),
    ],
)  # fmt: skip
def test_a_model_on_it_is_the_model_without(
    recipe: str, kernels: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient: alone, with scales folded in, in joined layers, beside the others.

    In bf16 by the GEMM, and in float32 by the matmul and the row kernel in its place.
    """
    attend_as_flash_attention(monkeypatch)
    config = small(
        PUBLISHED[recipe], layers=3, ve_layers="none", xsa_layers="1", dim=64, mlp_hidden=96
    )
    model = randomised(config, FP32)
    others = {"leaky_relu2_mlp": "triton"}
    if kernels != "none":
        rows = {n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations}
        others = rows | others | KERNELS[kernels]
    for dtype in (BF16, FP32):
        found = []
        for impl in ("reference", "triton"):
            twin = GPT(config, dtype, max_length=TIME, ops={**others, "norm_mlp": impl})
            twin.load_state_dict(model.state_dict())
            if compiled and impl == "triton":
                torch._dynamo.reset()
                twin.compile(fullgraph=True, backend="aot_eager")
            with Started() as started:
                loss, gradients = loss_and_gradients(twin)
            found.append([loss, *gradients])
        if dtype == BF16:
            mine = [name for name in started if name in FORWARD + BACKWARD]
            assert mine == FORWARD * 3 + BACKWARD * 3
        rtol, atol = (0.1, 0.03) if dtype == BF16 else (1e-4, 1e-4)
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol * plain.abs().max().item())


@here
def test_a_model_without_gradients() -> None:
    """The forward pass alone is that of the two operators, to the bit."""
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="none", xsa_layers="1", dim=64)
    model = randomised(config, FP32)
    losses = []
    for impl in ("reference", "triton"):
        ops = {n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations}
        twin = GPT(config, BF16, max_length=TIME, ops={**ops, "leaky_relu2_mlp": "triton",
                                                       "norm_mlp": impl})  # fmt: skip
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            losses.append(twin(*batch(config)))
    assert torch.equal(*losses)


@here
@pytest.mark.parametrize("mlp", ["reference", "cpu"])
def test_a_model_with_another_mlp_takes_two_steps(mlp: str) -> None:
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="none", xsa_layers="1", dim=64)
    model = randomised(config, FP32)
    found = []
    for impl in ("reference", "triton"):
        twin = GPT(config, FP32, TIME, ops={"leaky_relu2_mlp": mlp, "norm_mlp": impl})
        twin.load_state_dict(model.state_dict())
        with Started() as started:
            found.append(loss_and_gradients(twin))
        assert started == []
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


@here
def test_under_autocast_a_model_takes_two_steps() -> None:
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="none", xsa_layers="1", dim=64)
    model = randomised(config, FP32)
    losses = []
    for impl in ("reference", "triton"):
        ops = {"leaky_relu2_mlp": "triton", "norm_mlp": impl}
        twin = GPT(config, FP32, TIME, ops=ops)
        twin.load_state_dict(model.state_dict())
        with torch.autocast("cpu", BF16):
            losses.append(twin(*batch(config)))
    assert torch.equal(*losses)


def test_parts_of_sums() -> None:
    """As many as the GEMM has blocks of rows, which are others than `residual_norm` has."""
    factor = torch.ones(8)
    assert [sums_of(n, factor).parts for n in (0, 1, PART, PART + 1, 98304)] == [0, 1, 1, 2, 768]
    assert sums_of_norm(98304, x_in_scale=factor).parts != 768
