"""XSA with its output projection: what it is made of, what it saves, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model import GPT
from pgolf.ops import xsa, xsa_linear
from pgolf.ops.choose import choose
from pgolf.ops.compile import Recorder
from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import Call, kernel
from pgolf.triton_kernels.launch import intercepted

from ..model.published import PUBLISHED, small
from ..model.test_forms import attend_as_flash_attention, batch
from ..model.test_gpt_spec import TIME, randomised
from ..triton.interpreter import repair
from .cases import implementations

repair()

BF16 = torch.bfloat16
here = pytest.mark.skipif(
    "triton" not in implementations(OPERATORS["xsa_linear"]), reason="no interpreter here"
)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4, 32), (2, 3, 2, 32), (8, 128)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


def test_the_reference_and_auto_are_two_steps_in_the_open() -> None:
    """By the operator `xsa` as it is named, to the bit, and no operator of its own."""
    y, v, w = inputs()
    for impl, named, step in (
        ("reference", None, "reference"), ("auto", None, "auto"), ("auto", "reference", "reference")
    ):  # fmt: skip
        with Recorder() as recorder:
            out = xsa_linear(y, v, w, impl, named)
        names = {call[0]._schema.name for call in recorder.calls}
        assert names <= {"pgolf::xsa"} and bool(names) == (step == "auto")
        assert torch.equal(out, F.linear(xsa(y, v, step).flatten(2), w))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_waits_for_a_gpu(device: str, compiled: bool) -> None:
    choice = choose("xsa_linear", "auto", device, BF16, compiled)
    assert choice.impl == "reference" and "`xsa`, then torch's matmul" in choice.reason


@here
def test_the_forward_pass_is_that_of_xsa_by_name() -> None:
    y, v, w = inputs()
    for named in ("reference", "triton"):
        started = []
        with intercepted(lambda launch, s=started: (s.append(launch.kernel.__name__), launch())):
            out = xsa_linear(y, v, w, "triton", named)
        assert started == ["xsa_forward_kernel"] * (named == "triton")
        assert torch.equal(out, F.linear(xsa(y, v, named).flatten(2), w))


@here
def test_no_gradient_between_them_is_written() -> None:
    """One launch for dy and dv; kept are the arguments and z, as by the two steps."""
    call = Call(
        OPERATORS["xsa_linear"].reference, inputs(BF16), differentiable=("y", "v", "w"),
        contiguous=True,
    )  # fmt: skip
    started, kept = [], []
    leaves = call.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call.on(kernel(OPERATORS["xsa_linear"], "triton"), *leaves)
    with intercepted(lambda launch: (started.append(launch.kernel.__name__), launch())):
        call.gradients(out, leaves)
    assert started == ["xsa_linear_dgrad_tma"]
    known = {t.data_ptr() for t in leaves}
    assert [t.shape for t in kept if t.data_ptr() not in known] == [leaves[0].shape]
    assert call.problem(kernel(OPERATORS["xsa_linear"], "triton")) == ""


@here
@pytest.mark.parametrize("named", ["reference", "triton"])
def test_heads_that_lie_behind_tokens(named: str) -> None:
    """As torch's attention gives them; z is contiguous in any case."""
    y, v, w = inputs()
    turned = y.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = torch.autograd.grad(xsa_linear(turned, v, w, "triton", named).square().sum(), turned)
    y.requires_grad_()
    expected = torch.autograd.grad(xsa_linear(y, v, w, "reference").square().sum(), y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@here
def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    y, v, w = inputs(BF16)
    started = []
    out = xsa_linear(y, v, w.requires_grad_(), "triton")
    with intercepted(lambda launch: started.append(launch.kernel.__name__)):
        out.sum().backward()
    assert started == [] and w.grad is not None


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(3, 4, 32)}, r"y is (3, 4, 32): it has to be (N, T, H, d)"),
        ({"v": torch.ones(2, 3, 3, 32)}, "4 query heads cannot be shared out over 3"),
        ({"w": torch.ones(128)}, "w is (128,): with y (2, 3, 4, 32) it has to be (D, 128)"),
        ({"w": torch.ones(8, 96)}, "w is (8, 96): with y (2, 3, 4, 32) it has to be (D, 128)"),
        ({"w": torch.ones(0, 128)}, "it has to be (D, 128) with D not 0"),
        ({"w": torch.ones(8, 128, dtype=BF16)}, "w is torch.bfloat16 and y is torch.float32"),
        ({"w": torch.ones(8, 128, device="meta")}, "w is on meta and y on cpu: move one"),
    ],
)
def test_refused(change: dict, message: str, impl: str) -> None:
    arguments = dict(zip(("y", "v", "w"), inputs(), strict=True)) | change
    with pytest.raises(ValueError) as caught:
        xsa_linear(**arguments, impl=impl)
    assert str(caught.value).startswith("xsa_linear: ") and message in str(caught.value)


def test_unknown_and_too_large() -> None:
    y, v, w = inputs()
    with pytest.raises(ValueError, match="xsa_linear: impl=cuda: there is no 'cuda', only triton"):
        xsa_linear(y, v, w, "cuda")
    wide = torch.ones(1, 1, 1, 300)
    with pytest.raises(ValueError, match="xsa_linear: impl=triton: it takes at most 256 elements"):
        xsa_linear(wide, wide, torch.ones(2, 300), "triton")


@here
@pytest.mark.parametrize("xsa_impl", ["reference", "triton"])
def test_a_model_on_it_is_the_model_without(xsa_impl: str, monkeypatch) -> None:
    """Loss and every gradient, in bf16, where the epilogue runs."""
    attend_as_flash_attention(monkeypatch)
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="0", xsa_layers="1", dim=64)
    model = randomised(config, torch.float32)
    started, found = [], []
    for impl in ("reference", "triton"):
        ops = {"xsa_linear": impl, "xsa": xsa_impl}
        twin = GPT(config, BF16, max_length=TIME, ops=ops)
        twin.load_state_dict(model.state_dict())
        with intercepted(lambda launch: (started.append(launch.kernel.__name__), launch())):
            loss = twin(*batch(config))
            found.append((loss, *torch.autograd.grad(loss, list(twin.parameters()))))
    rows = ["xsa_forward_kernel"] * (xsa_impl == "triton")
    backward = ["xsa_backward_kernel"] * (xsa_impl == "triton")
    assert started == [*rows, *backward, *rows, "xsa_linear_dgrad_tma"]
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0.1, atol=0.02 * plain.abs().max().item())
