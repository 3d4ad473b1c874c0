"""A projection that is added to the residual stream: what it starts, keeps and refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model import GPT
from pgolf.ops import linear_residual, residual_norm, xsa_linear
from pgolf.ops.choose import choose
from pgolf.ops.compile import Recorder
from pgolf.ops.factored import Factored
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import deferred
from pgolf.ops.residual_norm import sums_of
from pgolf.ops.testing import Call, kernel
from pgolf.triton_kernels.launch import intercepted

from ..model.published import PUBLISHED, small
from ..model.test_forms import attend_as_flash_attention, batch, loss_and_gradients
from ..model.test_gpt_spec import TIME, randomised
from ..triton.interpreter import repair
from .cases import implementations
from .test_cost import Traffic

repair()

BF16 = torch.bfloat16
OPERATOR = OPERATORS["linear_residual"]
here = pytest.mark.skipif("triton" not in implementations(OPERATOR), reason="no interpreter here")


def inputs(dtype: torch.dtype = torch.float32, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, tokens, 64), (32, 64), (2, tokens, 32)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


class Started(list):
    """Names of the Triton kernels that start inside."""

    def __enter__(self) -> "Started":
        self._inside = intercepted(lambda one: (self.append(one.kernel.__name__), one()))
        self._inside.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)


@pytest.mark.parametrize("factored", [False, True])
def test_the_reference_and_auto_are_two_steps_in_the_open(factored: bool) -> None:
    """By the operator `residual_norm` as it is named, to the bit, and no operator of its own."""
    z, w, x = inputs()
    for impl, named, step in (
        ("reference", None, "reference"), ("auto", None, "auto"), ("auto", "reference", "reference")
    ):  # fmt: skip
        how = {"scale": 0.5, "eps": 0.1, "factored": factored}
        with Recorder() as recorder:
            x_in, h = linear_residual(z, w, x, impl=impl, norm_impl=named, **how)
        names = {call[0]._schema.name for call in recorder.calls}
        assert names <= {"pgolf::residual_norm"} and bool(names) == (step == "auto")
        wanted, normed = residual_norm(x, branch=F.linear(z, w), impl=step, **how)
        h, normed = (t.product() if factored else t for t in (h, normed))
        assert torch.equal(x_in, wanted) and torch.equal(h, normed)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_waits_for_a_gpu(device: str, compiled: bool) -> None:
    choice = choose("linear_residual", "auto", device, BF16, compiled)
    assert choice.impl == "reference" and "torch's matmul, then" in choice.reason


@here
@pytest.mark.parametrize("norm_impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_results_and_gradients(dtype: torch.dtype, norm_impl: str) -> None:
    """With the norm's gradient by its kernel and in plain torch; in fp32 without the GEMM."""

    def run(z: Tensor, w: Tensor, x: Tensor, impl: str = "triton") -> tuple[Tensor, Tensor]:
        how = {"norm_impl": norm_impl} if impl == "triton" else {}
        x_in, h = linear_residual(
            z, w, x, scale=-0.5, eps=0.1, factored=True, impl=impl, **how
        )
        return x_in, h.product()

    call = Call(
        lambda z, w, x: run(z, w, x, "reference"), inputs(dtype), differentiable=("z", "w", "x")
    )
    with Started() as started:
        assert call.problem(run) == ""
    assert started == ["linear_residual_tma"] * (dtype == BF16)


@here
def test_one_launch_and_nothing_kept_but_the_sum_and_the_factor() -> None:
    call = Call.of(OPERATOR, OPERATOR.samples()[0], BF16, contiguous=True)
    kept, leaves = [], call.leaves()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        Started() as started,
    ):
        x_in, h = linear_residual(*leaves, scale=0.5, factored=True, impl="triton")
    assert started == ["linear_residual_tma"]
    known = {t.data_ptr() for t in leaves}
    assert [t.data_ptr() for t in kept if t.data_ptr() not in known] == [
        x_in.data_ptr(), h.factor.data_ptr()
    ]  # fmt: skip
    with Started() as started:
        torch.autograd.grad([x_in, h.y], leaves, [x_in, h.y])
    assert started == []


@here
def test_least_bytes_are_those_that_are_touched() -> None:
    """By the GEMM; by torch's in the gradient, beside what the norm's takes by itself."""
    call = Call.of(OPERATOR, OPERATOR.samples()[0], BF16)
    z, w, x = leaves = call.leaves()
    forward, backward = OPERATOR.cost(**call.arguments)
    named = {n: v for n, v in call.arguments.items() if n not in "zwx"}
    with (traffic := Traffic()).counted():
        x_in, h = linear_residual(*leaves, impl="triton", **named)
    assert (traffic.read, traffic.written) == (forward.read, forward.written)
    with (traffic := Traffic()).counted():
        torch.autograd.grad([x_in, h.y], leaves, [x_in, h.y])
    of_norm = OPERATORS["residual_norm"].cost(x, branch=x, eps=1e-6, **named)[1]
    assert traffic.read + of_norm.read == backward.read
    assert traffic.written + of_norm.written == backward.written


@here
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_each_gradient_alone(dtype: torch.dtype) -> None:
    """Whichever results are used, and whichever arguments learn."""
    given = inputs(dtype)
    for used in ((0,), (1,), (0, 1)):
        for learns in ((0,), (1,), (2,), (0, 1, 2)):
            found = []
            for impl in ("reference", "triton"):
                leaves = [t.clone().requires_grad_(i in learns) for i, t in enumerate(given)]
                x_in, h = linear_residual(*leaves, eps=0.1, factored=True, impl=impl)
                results = (x_in, h.product())
                loss = sum((results[i].float() * (i + given[2])).sum() for i in used)
                found.append(torch.autograd.grad(loss, [leaves[i] for i in learns]))
            for plain, ours in zip(*found, strict=True):
                torch.testing.assert_close(
                    ours, plain, rtol=0.02 if dtype == BF16 else 1e-4,
                    atol=(0.02 if dtype == BF16 else 1e-5) * plain.abs().max().item(),
                )  # fmt: skip


@here
@pytest.mark.parametrize("later", [False, True])
def test_a_sum_that_goes_on_as_a_product(later: bool) -> None:
    """x_in_scale's gradient is residual_norm's, from here or later, and so are all others."""
    z, w, x = inputs(tokens=70)
    factor = torch.linspace(-1, 2, 32)
    found = []
    for ours in (False, True):
        leaves = [t.clone().requires_grad_() for t in (z, w, x, factor)]
        sums = None
        if later:
            (sums,) = deferred([sums_of(140, x_in_scale=leaves[3])], "auto")
        how = {"x_in_scale": leaves[3], "sums": sums, "scale": 0.5, "factored": True}
        if ours:
            x_in, h = linear_residual(*leaves[:3], impl="triton", **how)
        else:
            x_in, h = residual_norm(leaves[2], branch=F.linear(*leaves[:2]), **how)
        upstream = [torch.sin(x_in.detach()), torch.cos(x_in.detach())]
        found.append(torch.autograd.grad([x_in, h.y], leaves, upstream))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@here
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_behind_xsa_linear(impl: str) -> None:
    """The gradient of a product goes to its ticket: neither it nor dz is written where both run."""
    g = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4, 64), (2, 3, 2, 64), (32, 256), (2, 3, 32)
    given = [torch.randn(shape, generator=g).to(BF16) for shape in shapes]

    def run(y: Tensor, v: Tensor, w: Tensor, x: Tensor, ours: bool = True) -> tuple:
        if not ours:
            x_in, h = residual_norm(x, branch=xsa_linear(y, v, w, "reference"), impl="reference")
            return x_in, h
        z, w, out = xsa_linear(y, v, w, impl, "triton", as_product=True)
        assert (out is None) == (impl == "reference")
        x_in, h = linear_residual(z, w, x, out=out, factored=True, impl="triton")
        return x_in, h.product()

    call = Call(
        lambda y, v, w, x: run(y, v, w, x, ours=False), given,
        differentiable=("y", "v", "w", "x"), contiguous=True,
    )  # fmt: skip
    with Started() as started:
        assert call.problem(run) == ""
    backward = "xsa_backward_kernel" if impl == "reference" else "xsa_linear_dgrad_tma"
    assert started == ["xsa_forward_kernel", "linear_residual_tma", backward]


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(())}, "z is (): it has to be (..., K), K >= 1"),
        ({"x": torch.ones(2, 3, 0)}, "x is (2, 3, 0): it has to be (..., D), D >= 1"),
        ({"z": torch.ones(3, 64)}, "it has to be (2, 3, 64)"),
        ({"w": torch.ones(32, 63)}, "w is (32, 63): with x (2, 3, 32) and z (2, 3, 64) it has to"),
        ({"out": torch.ones(2, 32)}, "out is (2, 32): with x (2, 3, 32)"),
        ({"w": torch.ones(32, 64, dtype=BF16)}, "w is torch.bfloat16 and z is torch.float32"),
        ({"x": torch.ones(2, 3, 32, device="meta")}, "x is on meta and z on cpu: move one"),
        ({"scale": 0.0}, "scale=0.0: it has to be finite and not 0"),
        ({"eps": -1.0}, "eps=-1.0: it has to be 0 or more, and finite"),
    ],
)
def test_refused(change: dict, message: str, impl: str) -> None:
    arguments = dict(zip(("z", "w", "x"), inputs(), strict=True)) | change
    with pytest.raises(ValueError) as caught:
        linear_residual(**arguments, impl=impl)
    assert str(caught.value).startswith("linear_residual: ") and message in str(caught.value)


@here
def test_refused_by_kernels() -> None:
    z, w, x = inputs()
    with pytest.raises(ValueError, match="linear_residual: impl=cuda: there is no 'cuda'"):
        linear_residual(z, w, x, impl="cuda")
    wide = torch.ones(1, 4097)
    with pytest.raises(ValueError, match="impl=triton: it takes at most 4096 elements a row"):
        linear_residual(torch.ones(1, 2), torch.ones(4097, 2), wide, impl="triton")
    for how, message in (
        ({"x_in_scale": torch.ones(25)}, r"x_in_scale is torch.float32 \(25,\) on cpu"),
        ({"x_in_scale": torch.ones(32), "norm_impl": "reference"}, "takes no products"),
        ({"sums": torch.ones(2, 32)}, r"sums is \(2, 32\): .* has to be \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_residual(z, w, x, impl="triton", **how)
    with pytest.raises(ValueError, match="impl=reference takes no ticket"):
        linear_residual(z, w, x, out=x, impl="reference")
    x_in, _ = linear_residual(z, w, x.requires_grad_(), impl="triton")
    (dx,) = torch.autograd.grad(x_in.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm: its kernels have first derivatives"):
        torch.autograd.grad(dx.sum(), x)


@here
@pytest.mark.parametrize("xsa_linear_impl", ["reference", "triton"])
@pytest.mark.parametrize("kernels", ["none", "not joined", "joined"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_model_on_it_is_the_model_without(
    dtype: torch.dtype, kernels: str, xsa_linear_impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient: alone, with scales folded in, and in joined layers.

    In bf16 by the GEMM, in fp32 by the matmul and the row kernel in its place.
    """
    attend_as_flash_attention(monkeypatch)
    config = small(PUBLISHED["pr1473"], layers=3, ve_layers="0", xsa_layers="1", dim=64)
    model = randomised(config, torch.float32)
    others = {} if kernels == "none" else {
        n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations
    }  # fmt: skip
    if kernels == "not joined":
        others["scaled_copies"] = "reference"
    found = []
    for impl in ("reference", "triton"):
        of_xsa = xsa_linear_impl if impl == "triton" else "reference"
        ops = {**others, "linear_residual": impl, "xsa_linear": of_xsa}
        twin = GPT(config, dtype, max_length=TIME, ops=ops)
        twin.load_state_dict(model.state_dict())
        with Started() as started:
            loss, gradients = loss_and_gradients(twin)
        found.append([loss, *gradients])
    if dtype == BF16:
        epilogues = ["xsa_linear_dgrad_tma"] * (xsa_linear_impl == "triton")
        assert started == ["linear_residual_tma"] * 3 + epilogues
    rtol, atol = (0.1, 0.02) if dtype == BF16 else (1e-4, 1e-4)
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol * plain.abs().max().item())


@here
def test_under_autocast_a_model_takes_two_steps() -> None:
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="0", xsa_layers="1", dim=64)
    model = randomised(config, torch.float32)
    twin = GPT(config, torch.float32, max_length=TIME, ops={"linear_residual": "triton"})
    twin.load_state_dict(model.state_dict())
    with torch.autocast("cpu", BF16), Started() as started:
        loss, wanted = (m(*batch(config)) for m in (twin, model))
    assert started == [] and torch.equal(loss, wanted)


def test_what_samples_multiply_out() -> None:
    z, w, x = inputs()
    x_in, h = kernel(OPERATOR, "reference")(z, w, x, factored=True)
    assert not isinstance(h, Factored) and h.shape == x_in.shape
