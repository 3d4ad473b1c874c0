"""A projection with what qk_rope makes of it: what it starts, keeps and refuses."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model import GPT
from pgolf.ops import linear_qk_rope, qk_rope
from pgolf.ops.choose import choose
from pgolf.ops.compile import Recorder
from pgolf.ops.compile import _opaque_calls as opaque_calls
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import deferred
from pgolf.ops.qk_rope import rope_table, sums_of
from pgolf.ops.testing import Call
from pgolf.ops.token_sums import shared_orders

from ..model.published import PUBLISHED, small
from ..model.test_forms import attend_as_flash_attention, batch, loss_and_gradients
from ..model.test_gpt_spec import TIME, randomised
from ..triton.interpreter import repair
from .cases import implementations
from .test_cost import Traffic
from .test_linear_residual import Started

repair()

BF16, FP32 = torch.bfloat16, torch.float32
OPERATOR = OPERATORS["linear_qk_rope"]
KERNEL = "linear_qk_rope_tma"
HEADS, GROUPS, SIZE, WIDTH, ROWS = 4, 2, 64, 40, 7
here = pytest.mark.skipif("triton" not in implementations(OPERATOR), reason="no interpreter here")
every_gradient = pytest.mark.parametrize(
    "rope_impl", ["reference", *implementations(OPERATORS["qk_rope"])]
)


def inputs(dtype: torch.dtype = FP32, time: int = 3) -> dict[str, Tensor]:
    """By name, with a table of values."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    cos, sin = rope_table(time, 16, 100.0)
    return {
        "x": normal(2, time, WIDTH), "w": normal((HEADS + 2 * GROUPS) * SIZE, WIDTH),
        "cos": cos, "sin": sin, "gain": torch.linspace(-0.5, 1.5, HEADS),
        "factor": torch.linspace(1.5, -0.5, 2 * time).view(2, time),
        "value": normal(ROWS, GROUPS * SIZE),
        "value_ids": torch.randint(ROWS, (2, time), generator=g),
    }  # fmt: skip


def run(given: dict[str, Tensor], **how) -> tuple[Tensor, ...]:
    return linear_qk_rope(**given, heads=HEADS, kv_heads=GROUPS, eps=0.1, **how)


LEARN = ("x", "w", "gain", "value", "factor")


def problem(given: dict[str, Tensor], rope_impl: str, **how) -> str:
    """What is wrong with the kernels, by the rule of accuracy; '' if nothing is."""
    settings = {"heads": HEADS, "kv_heads": GROUPS, "eps": 0.1, **how}
    call = Call(OPERATOR.reference, (), given | settings, differentiable=LEARN)
    return call.problem(functools.partial(linear_qk_rope, impl="triton", rope_impl=rope_impl))


@pytest.mark.parametrize("split_v", [False, True])
def test_the_reference_and_auto_are_two_steps_in_the_open(split_v: bool) -> None:
    """By the operator `qk_rope` as it is named, to the bit, and no operator of its own."""
    given = inputs()
    rest = {n: t for n, t in given.items() if n not in "xw"}
    for impl, named, step in (
        ("reference", None, "reference"), ("auto", None, "auto"), ("auto", "reference", "reference")
    ):  # fmt: skip
        with Recorder() as recorder:
            found = run(given, impl=impl, rope_impl=named, split_v=split_v)
        names = {call[0]._schema.name for call in recorder.calls}
        assert names <= {"pgolf::qk_rope"} and bool(names) == (step == "auto")
        wanted = qk_rope(
            F.linear(given["x"], given["w"]), **rest, heads=HEADS, kv_heads=GROUPS, eps=0.1,
            impl=step, split_v=split_v,
        )  # fmt: skip
        assert len(found) == 3 + split_v and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_waits_for_a_gpu(device: str, compiled: bool) -> None:
    choice = choose("linear_qk_rope", "auto", device, BF16, compiled)
    assert choice.impl == "reference" and "torch's matmul, then" in choice.reason


@here
@every_gradient
@pytest.mark.parametrize("split_v", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_results_and_gradients(dtype: torch.dtype, split_v: bool, rope_impl: str) -> None:
    """With the gradient by each kernel and in plain torch; in fp32 without the GEMM."""
    given = inputs(dtype, 13)
    if dtype == FP32:  # (whose two steps have tests of tables of their own)
        del given["value_ids"]
        given["value"] = given["value"][:1].expand(2, 13, -1)
    with Started() as started:
        assert problem(given, rope_impl, split_v=split_v) == ""
    assert started == [KERNEL] * (dtype == BF16)


@here
@every_gradient
def test_gains_of_nothing_learn(rope_impl: str) -> None:
    """n is found in a q that is nearly 0: d_gain is as right as others; x learns nothing of it."""
    given = inputs(BF16, 13)
    given["gain"] = torch.tensor([0.0, -0.0, 1e-36, -0.5])
    assert problem(given, rope_impl) == ""
    leaves = {n: t.clone().requires_grad_() for n, t in given.items() if n in LEARN}
    q, *_ = run(given | leaves, impl="triton", rope_impl=rope_impl)
    for head in (0, 1):
        dx, d_gain = torch.autograd.grad(
            q[:, :, head].float().sin().sum() + q[:, :, head].float().sum(),
            [leaves["x"], leaves["gain"]], retain_graph=True,
        )  # fmt: skip
        assert not dx.any() and d_gain[head].abs() > 1e-3 and d_gain.count_nonzero() == 1


@here
@pytest.mark.parametrize("change", [{"norm": False}, {"heads": 3}, {"cos": 24}])
def test_what_makes_no_tiles_takes_two_steps(change: dict) -> None:
    given, how = inputs(BF16), {"heads": HEADS, "kv_heads": GROUPS, "eps": 0.1, **change}
    if "cos" in change:
        given["cos"], given["sin"] = rope_table(3, how.pop("cos"), 100.0)
    if change.get("heads"):
        given |= {"w": given["w"][: 7 * SIZE], "gain": given["gain"][:3]}
    with Started() as started:
        found = linear_qk_rope(**given, **how, impl="triton")
    assert started == []
    assert all(map(torch.equal, found, linear_qk_rope(**given, **how)))


@here
def test_one_launch_and_nothing_kept_but_results_and_rstd() -> None:
    given, kept = inputs(BF16), []
    leaves = {n: t.clone().requires_grad_(n in LEARN) for n, t in given.items()}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        Started() as started,
    ):
        q, k, v = run(leaves, impl="triton")
    assert started == [KERNEL]
    known = {t.data_ptr() for t in leaves.values()}
    new = [t for t in kept if t.data_ptr() not in known]
    assert [t.data_ptr() for t in new[:2]] == [q.data_ptr(), k.data_ptr()]
    assert [tuple(t.shape) for t in new[2:]] == [(2, 3, HEADS + GROUPS)]
    learn = [leaves[n] for n in LEARN]
    with Started() as started:
        torch.autograd.grad([q, k, v], learn, [q, k, v])
    assert started == []


@here
@pytest.mark.parametrize("split_v", [False, True])
def test_least_bytes_are_those_that_are_touched(split_v: bool) -> None:
    """By the GEMM; by torch's in the gradient, beside what a pass over its rows takes."""
    given = inputs(BF16) | {"heads": HEADS, "kv_heads": GROUPS, "eps": 0.1, "split_v": split_v}
    given["value_ids"][:] = torch.arange(6).view(2, 3)
    given["value"] = given["value"][:6]  # all rows are read
    forward, backward = OPERATOR.cost(**given)
    leaves = [given[n].requires_grad_() for n in LEARN[:4]]
    with (traffic := Traffic()).counted():
        results = linear_qk_rope(**given, impl="triton", rope_impl="reference")
    assert (traffic.read, traffic.written) == (forward.read, forward.written)
    with (traffic := Traffic()).counted():
        torch.autograd.grad(results, leaves, results)
    of_rows = dict(given, qkv=F.linear(given["x"], given["w"]))
    rows = OPERATORS["qk_rope"].cost(**{n: v for n, v in of_rows.items() if n not in "xw"})[1]
    rstd = 4 * 2 * 3 * (HEADS + GROUPS)
    assert traffic.read + rows.read + rstd == backward.read
    assert traffic.written + rows.written == backward.written


@here
@every_gradient
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3)])
def test_each_gradient_alone(used: tuple[int, ...], rope_impl: str) -> None:
    """Whichever results are used, and whichever arguments learn: the same to the bit."""
    given = inputs(BF16)

    def gradients(learn: tuple[str, ...], impl: str) -> dict[str, Tensor | None]:
        leaves = {n: given[n].clone().requires_grad_() for n in learn}
        results = run(given | leaves, impl=impl, rope_impl=rope_impl, split_v=True)
        loss = sum((results[i].float() * (i + 1)).sum() for i in used)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return dict(zip(learn, found, strict=True))

    together, plain = gradients(LEARN, "triton"), gradients(LEARN, "reference")
    for name, ours in together.items():
        wanted = plain[name]
        if wanted is None:
            assert ours is None or not ours.any()
            continue
        if name == "factor" and used == (1,):
            continue  # next to nothing, with keys that are normed: what is rounded is more
        atol = (0.1 if name == "factor" else 0.02) * wanted.abs().max().item()
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=atol, msg=name)
    for name in LEARN:
        if plain[name] is not None:
            alone = gradients((name,), "triton")[name]
            assert torch.equal(alone, together[name]), name


@here
@pytest.mark.parametrize("rope_impl", implementations(OPERATORS["qk_rope"]))
def test_sums_that_come_later_and_an_order_that_is_known(rope_impl: str) -> None:
    """gain's gradient from there and the table's by that order, to the bit."""
    given = inputs(BF16, 70)
    (order,) = shared_orders([(given["value_ids"], ROWS)], rope_impl)
    found = []
    for later in (False, True):
        leaves = {n: given[n].clone().requires_grad_() for n in LEARN}
        how = {"value_order": order} if later else {}
        if later:
            (how["sums"],) = deferred([sums_of(140, leaves["gain"])], rope_impl)
        results = run(given | leaves, impl="triton", rope_impl=rope_impl, **how)
        upstream = [torch.sin(t.detach().float()).to(BF16) for t in results]
        found.append(torch.autograd.grad(results, list(leaves.values()), upstream))
    for now, then in zip(*found, strict=True):
        torch.testing.assert_close(then, now, rtol=1e-6, atol=1e-5)


@here
def test_inductor_meets_it_before_a_model() -> None:
    """Although fp32, in which others are met, has no GEMM."""
    met = {str(call[0]) for call in opaque_calls(OPERATOR, "cpu")}
    wanted = "linear_qk_rope", "qk_rope_backward_of_results"
    assert met >= {f"pgolf.{name}.default" for name in wanted}


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, WIDTH)}, "x is (3, 40): it has to be (N, T, D), D >= 1"),
        ({"w": torch.ones(512, 39)}, "w is (512, 39): with x (2, 3, 40) it has to be (8 d, 40)"),
        ({"w": torch.ones(511, WIDTH)}, "w is (511, 40): with x"),
        ({"w": torch.ones(512, WIDTH, dtype=BF16)}, "w is torch.bfloat16 and x is torch.float32"),
        ({"x": torch.ones(2, 3, WIDTH, device="meta")}, "w is on cpu and x on meta: move one"),
        ({"heads": 0}, "heads=0, kv_heads=2: both have to be 1 or more"),
        ({"eps": -1.0}, "eps=-1.0: it has to be 0 or more, and finite"),
        ({"cos": torch.ones(2, 8)}, "cos is (2, 8): for this x it has to be (3, r/2)"),
        ({"gain": torch.ones(3)}, "gain is (3,): it has to be (4,)"),
        ({"gain": torch.ones(4).double()}, "gain is torch.float64 on cpu: it has to be torch.fl"),
        ({"factor": torch.ones(3, 2)}, "factor is (3, 2): it has to be (2, 3), one a token"),
        ({"value": torch.ones(7, 100)}, "value is (7, 100): with value_ids it has to be a table"),
        ({"value_ids": None}, "value is (7, 128): it has to be (2, 3, 128), as v"),
        ({"value_ids": None, "value": None, "value_order": ()}, "value_order is given without"),
    ],
)
def test_refused(change: dict, message: str, impl: str) -> None:
    arguments = inputs() | {"heads": HEADS, "kv_heads": GROUPS} | change
    with pytest.raises(ValueError) as caught:
        linear_qk_rope(**arguments, impl=impl)
    assert str(caught.value).startswith("linear_qk_rope: ") and message in str(caught.value)


@here
def test_refused_by_kernels() -> None:
    given = inputs(BF16)
    with pytest.raises(ValueError, match="linear_qk_rope: impl=cuda: there is no 'cuda'"):
        run(given, impl="cuda")
    with pytest.raises(ValueError, match=r"sums is \(2, 24\): .* has to be \(1, 4\)"):
        run(given, impl="triton", sums=torch.ones(2, 24))
    wide = {"w": torch.ones(4 * 257, 8), "x": torch.ones(1, 1, 8), "gain": torch.ones(2)}
    with pytest.raises(ValueError, match="impl=triton: it takes at most 256 elements a head"):
        linear_qk_rope(**wide, cos=torch.ones(1, 8), sin=torch.ones(1, 8), heads=2, kv_heads=1,
                       impl="triton")  # fmt: skip
    x = given["x"].requires_grad_()
    q, _, _ = run(given, impl="triton")
    (dx,) = torch.autograd.grad(q.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_qk_rope: its kernels have first derivatives"):
        torch.autograd.grad(dx.sum(), x)


# --- in a model -----------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("others", ["reference", "triton"])
@pytest.mark.parametrize("kernels", ["none", "joined"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_model_on_it_is_the_model_without(
    dtype: torch.dtype, kernels: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient: alone, in joined layers, and beside the other epilogues.

    In bf16 by the GEMM, in fp32 by the matmul and the row kernel in its place.
    """
    attend_as_flash_attention(monkeypatch)
    config = small(
        PUBLISHED["pr1473"], layers=3, ve_layers="0", xsa_layers="1", dim=256, rope_dims=16
    )
    model = randomised(config, FP32)
    chosen = {} if kernels == "none" else {
        n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations
    }  # fmt: skip
    found = []
    for impl in ("reference", "triton"):
        epilogues = others if impl == "triton" else "reference"
        ops = {**chosen, "linear_qk_rope": impl, "linear_residual": epilogues,
               "xsa_linear": epilogues}  # fmt: skip
        twin = GPT(config, dtype, max_length=TIME, ops=ops)
        twin.load_state_dict(model.state_dict())
        with Started() as started:
            loss, gradients = loss_and_gradients(twin)
        found.append([loss, *gradients])
    assert started.count(KERNEL) == 3 * (dtype == BF16)
    rtol, atol = (0.1, 0.02) if dtype == BF16 else (1e-4, 1e-4)
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol * plain.abs().max().item())


@here
def test_under_autocast_a_model_takes_two_steps() -> None:
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="0", xsa_layers="1", dim=256)
    model = randomised(config, FP32)
    twin = GPT(config, FP32, max_length=TIME, ops={"linear_qk_rope": "triton"})
    twin.load_state_dict(model.state_dict())
    with torch.autocast("cpu", BF16), Started() as started:
        loss, wanted = (m(*batch(config)) for m in (twin, model))
    assert started == [] and torch.equal(loss, wanted)


@here
def test_dynamic_widths_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(run, impl="triton"), fullgraph=True, dynamic=True, backend="eager"
    )
    for width in (16, 24, 40):
        given = inputs(BF16)
        given |= {"x": given["x"][..., :width], "w": given["w"][:, :width]}
        assert all(map(torch.equal, compiled(given), run(given, impl="triton")))
