"""The residual stream, its mix with x0 and its norm against the formulas."""

import pytest
import torch
from torch import Tensor

from pgolf.ops.operator import OPERATORS
from pgolf.ops.residual_norm import cost, residual_norm, rms_norm
from pgolf.ops.residual_norm_kernels import MAX_PARTS, MIN_PART
from pgolf.ops.tensors import nbytes, parts_of

from .cases import implementations
from .guards import GuardZones

KERNELS = implementations(OPERATORS["residual_norm"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)
every_form = pytest.mark.parametrize("impl", ["reference", *KERNELS])
in_double = pytest.mark.parametrize("impl", ["reference", *(n for n in KERNELS if n == "cpu")])


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@in_double
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
def test_norm_and_its_eps(eps: float, impl: str) -> None:
    x = sample(2, 3, 16)
    torch.testing.assert_close(rms_norm(x, eps, impl), normed(x, eps), rtol=1e-13, atol=0)


@every_form
@pytest.mark.parametrize("scale", [0.005, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_fp32_and_eps_is_absolute(
    dtype: torch.dtype, scale: float, impl: str
) -> None:
    """The embedding starts at std 0.005: with bf16's own eps it would be damped."""
    x = (sample(64, 512) * scale).to(dtype)
    out = rms_norm(x, 1e-6, impl)
    assert out.dtype is dtype
    error = (out.double() - normed(x, 1e-6)).abs().max().item()
    # bf16: nothing but the rounding of results below 4
    assert error <= (1.01 * 2 if dtype is torch.bfloat16 else 8) * torch.finfo(dtype).eps


@every_form
def test_a_zero_row_is_zero(impl: str) -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, 1e-6, impl)
    out.sum().backward()
    assert not out.any() and x.grad.isfinite().all()


@in_double
def test_sum_mix_and_scale(impl: str) -> None:
    x, branch, skip, x0 = (sample(2, 3, 8).roll(i, -1) for i in range(4))
    a, w = torch.linspace(-1, 1, 8).double(), torch.linspace(2, 0, 8).double()
    mix = torch.stack((torch.linspace(0, 2, 8), torch.linspace(1, -1, 8))).double()
    total, mixed, h = residual_norm(
        x, branch=branch, branch_scale=a, skip=skip, skip_weight=w, x0=x0, mix=mix, scale=0.25,
        eps=1e-3, keep_total=True, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(total, x + a * branch + w * skip)
    torch.testing.assert_close(mixed, mix[0] * total + mix[1] * x0)
    torch.testing.assert_close(h, 0.25 * normed(mixed, 1e-3))


@in_double
def test_what_is_not_there_changes_nothing(impl: str) -> None:
    x, y = sample(2, 3, 8), sample(2, 3, 8).flip(0)
    kept, h = residual_norm(x, x0=y, eps=1e-3, impl=impl)
    assert kept is x
    torch.testing.assert_close(h, normed(x, 1e-3))
    total, x_in, _ = residual_norm(x, branch=y, eps=1e-3, keep_total=True, impl=impl)
    assert total is x_in
    torch.testing.assert_close(total, x + y)
    mix = torch.ones(2, 8).double()
    total, x_in, _ = residual_norm(x, x0=y, mix=mix, eps=1e-3, keep_total=True, impl=impl)
    assert total is x
    torch.testing.assert_close(x_in, x + y)


def test_the_reference_rounds_as_the_layers_of_the_scripts_do() -> None:
    """Parameters in the stream's dtype, one rounding a step."""
    x, y, z = (sample(4, 8).roll(i, -1).bfloat16() for i in range(3))
    a, mix = torch.linspace(0.1, 1, 8), torch.rand(2, 8)
    x_in, h = residual_norm(
        x, branch=y, branch_scale=a, x0=z, mix=mix, scale=0.3, eps=1e-6, impl="reference"
    )
    mix = mix.bfloat16()
    expected = mix[0] * (x + a.bfloat16() * y) + mix[1] * z
    assert torch.equal(x_in, expected)
    assert torch.equal(h, torch.nn.functional.rms_norm(expected, (8,), eps=1e-6) * 0.3)


@every_form
def test_parameters_are_fp32_beside_a_stream_in_bf16(impl: str) -> None:
    x = sample(2, 8).bfloat16()
    mix = torch.ones(2, 8, requires_grad=True)
    mixed, h = residual_norm(x, x0=x, mix=mix, scale=0.5, eps=1e-6, impl=impl)
    assert mixed.dtype is torch.bfloat16 and h.dtype is torch.bfloat16
    (gradient,) = torch.autograd.grad(h.sum(), mix)
    assert gradient.dtype is torch.float32


@in_double
def test_strided_inputs_and_gradients(impl: str) -> None:
    x, x0 = sample(2, 3, 8), sample(2, 3, 8).flip(0)
    mix = torch.rand(2, 8, dtype=torch.float64)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)

    def call(x, x0, mix):
        return residual_norm(x, x0=x0, mix=mix, scale=0.5, eps=1e-3, impl=impl)

    wide = torch.cat((mix, mix), 1)[:, ::2]
    torch.testing.assert_close(call(view, x0.mT.contiguous().mT, wide), call(x, x0, wide))
    leaves = [t.requires_grad_() for t in (view, x0, mix)]
    assert torch.autograd.gradcheck(call, leaves)


# --- the kernels ----------------------------------------------------------------------------------

STATES, PARAMETERS = ("x", "branch", "skip", "x0"), ("branch_scale", "skip_weight", "mix")


def arguments(rows: int, width: int, dtype: torch.dtype = torch.float32, without=()) -> dict:
    """All that residual_norm can take, but what is `without`."""
    g = torch.Generator().manual_seed(width)
    shapes = dict.fromkeys(STATES, (rows, width)) | dict.fromkeys(PARAMETERS, (width,))
    shapes["mix"] = (2, width)
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    made = {n: t.to(dtype) if n in STATES else t for n, t in made.items()}
    return {n: t for n, t in made.items() if n not in without}


def upstream(x: Tensor, missing=()) -> list[Tensor | None]:
    """Gradients of total, x_in and h; None where it is missing."""
    g = torch.Generator().manual_seed(9)
    made = [torch.randn(x.shape, generator=g).to(x.dtype) for _ in range(3)]
    return [None if i in missing else t for i, t in enumerate(made)]


def results(impl: str, args: dict, missing=()) -> dict[str, Tensor]:
    """The results and the gradients of all arguments by name, zeros where there is none."""
    leaves = {name: t.detach().requires_grad_() for name, t in args.items()}
    out = residual_norm(**leaves, scale=0.5, eps=1e-6, keep_total=True, impl=impl)
    pairs = [(o, g) for o, g in zip(out, upstream(out[0], missing), strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], [*leaves.values()], [g for _, g in pairs], materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    found = dict(zip(("total", "x_in", "h"), (t.detach() for t in out), strict=True))
    return found | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}


def close(impl: str, args: dict, missing=()) -> None:
    mine, theirs = (results(i, args, missing) for i in (impl, "reference"))
    for name, expected in theirs.items():
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            mine[name], expected, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_kernel
@pytest.mark.parametrize(
    "shape", [(1, 1), (130, 8), (9, 33), (3, 512), (2, 516), (3, 1031), (2, 4096)]
)
def test_shapes(impl: str, shape: tuple[int, int]) -> None:
    """A warp's and a block's rows, more rows than a block's, widths that no vector divides."""
    close(impl, arguments(*shape))


@every_kernel
@pytest.mark.parametrize(
    "without",
    [
        ("branch_scale",),
        ("skip_weight",),
        ("branch_scale", "skip_weight", "mix"),
        ("branch", "branch_scale"),
        ("branch", "branch_scale", "skip", "skip_weight"),
        ("mix", "x0", "skip", "skip_weight", "branch_scale"),
    ],
    ids=" ".join,
)
def test_what_is_left_out(impl: str, without: tuple) -> None:
    close(impl, arguments(5, 24, without=without))


@every_kernel
@pytest.mark.parametrize("without", [(), ("mix", "x0")], ids=["mix", "no mix"])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_that_are_missing(impl: str, missing: tuple, without: tuple) -> None:
    close(impl, arguments(3, 16, without=without), missing)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_address(impl: str, dtype: torch.dtype) -> None:
    """Memory that starts off a 16-byte boundary gives the numbers of memory that does not."""
    args = arguments(3, 64, dtype)
    off = {n: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for n, t in args.items()}
    assert all(t.data_ptr() % 16 for t in off.values())
    aligned, misaligned = results(impl, args), results(impl, off)
    for name, expected in aligned.items():
        step = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(misaligned[name], expected, rtol=step, atol=step)


LAYERS = {  # what layers of the recipes leave out, and which gradients they do not have
    "first": (("branch", "branch_scale", "skip", "skip_weight"), (0,)),
    "later": (("branch_scale", "skip", "skip_weight"), (0,)),
    "whose sum is a later one's skip": (("branch_scale", "skip", "skip_weight"), ()),
    "with the first skip": (("branch", "branch_scale"), (0,)),
    "with a skip": (("branch_scale",), (0,)),
    "MLP": (("branch_scale", "skip", "skip_weight", "x0", "mix"), ()),
    "end": (("branch_scale", "skip", "skip_weight", "x0", "mix"), (0, 1)),
}


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA kernels")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", [(1, 8), (27, 264), (3, 512)])
def test_kernels_for_what_layers_have(layer: str, shape: tuple[int, int]) -> None:
    """They give the numbers of those for any operands, which memory off 16 bytes takes."""
    without, missing = LAYERS[layer]
    args = arguments(*shape, torch.bfloat16, without)
    off = {n: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for n, t in args.items()}
    general = results("cuda", off, missing)
    for name, mine in results("cuda", args, missing).items():
        step = torch.finfo(mine.dtype).eps * (1 if mine.dtype is torch.bfloat16 else 100)
        torch.testing.assert_close(mine, general[name], rtol=step, atol=step, msg=name)


def test_sums_over_tokens_have_few_parts() -> None:
    """However many tokens there are: as many as the kernel expects, with the right sums."""
    parts = {rows: parts_of(rows, 64, 528) for rows in (0, 1, 64, 65, 64 * 528, 98304, 10**9)}
    assert list(parts.values()) == [0, 1, 1, 2, 528, 526, 528]
    if "cpu" in KERNELS:
        close("cpu", arguments(MIN_PART * MAX_PARTS + 1, 2))


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(impl: str, bad: float) -> None:
    args = arguments(4, 24)
    clean = results(impl, args)
    args["branch"][2, 23] = bad
    mine, theirs = results(impl, args), results("reference", args)
    for name, value in mine.items():
        assert torch.equal(value.isnan(), theirs[name].isnan()), name
        if value.shape == (4, 24):
            others = [0, 1, 3]
            assert torch.equal(value[others], clean[name][others]), name
    assert mine["h"][2].isnan().any()


@every_kernel
def test_gradients_of_what_is_added_with_no_factor_are_one_tensor(impl: str) -> None:
    args = arguments(3, 16, without=("branch_scale", "skip_weight"))
    found = results(impl, args)
    addresses = {found[f"d {name}"].data_ptr() for name in ("x", "branch", "skip")}
    assert len(addresses) == 1
    x, branch = (args[n].clone().requires_grad_() for n in ("x", "branch"))
    for _ in range(2):  # accumulated apart from each other
        residual_norm(x, branch=branch, eps=1e-6, impl=impl)[1].sum().backward()
    x.grad.zero_()
    assert branch.grad.any()


@every_kernel
def test_total_is_stored_only_for_who_wants_it(impl: str) -> None:
    args = arguments(3, 16)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    sizes = []
    for frozen in (True, False):
        leaves = {n: t.detach().requires_grad_(n != "mix" or not frozen) for n, t in args.items()}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _, h = residual_norm(**leaves, eps=1e-6, impl=impl)
        sizes.append(nbytes(*kept))
        torch.autograd.grad(h.sum(), leaves["x"])
    assert sizes[1] - sizes[0] == nbytes(args["x"])


@pytest.mark.skipif("cpu" not in KERNELS, reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    args = arguments(3000, 256, dtype)  # streamed in fp32
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results("cpu", args).values())
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@every_kernel
@pytest.mark.parametrize("shape", [(5, 33), (65, 16)])
def test_nothing_is_written_beyond_the_outputs(impl: str, shape: tuple[int, int]) -> None:
    args = arguments(*shape)
    expected = results(impl, args)
    with GuardZones():
        assert all(map(torch.equal, results(impl, args).values(), expected.values()))


def test_widths_beyond_the_kernels_limit() -> None:
    """An error by name, the reference where nobody asked for the kernel."""
    x = torch.ones(2, 4097)
    with pytest.raises(ValueError, match="impl=cpu: it takes at most 4096 elements a row"):
        rms_norm(x, 1e-6, "cpu")
    assert torch.equal(rms_norm(x, 1e-6), rms_norm(x, 1e-6, "reference"))


def refused() -> dict:
    """Message -> what has to be wrong with the call."""
    x, mix, a = torch.ones(3, 8), torch.ones(2, 8), torch.ones(8)
    return {
        "x is torch.float32 (): it has": {"x": torch.tensor(1.0)},
        "x is torch.float32 (3, 0): it has": {"x": torch.ones(3, 0)},
        "x is torch.int64": {"x": x.long()},
        "branch is torch.float32 (3, 7)": {"branch": torch.ones(3, 7)},
        "skip is torch.bfloat16": {"skip": x.bfloat16()},
        "there is branch_scale and no branch": {"branch_scale": a},
        "there is skip_weight and no skip": {"skip_weight": a},
        "there is mix and no x0": {"mix": mix},
        "mix is torch.float32 (8,)": {"x0": x, "mix": a},
        "for this x it has to be torch.float32 (2, 8) on cpu": {"x0": x, "mix": mix.double()},
        "branch_scale is torch.bfloat16": {"branch": x, "branch_scale": a.bfloat16()},
        "eps=-1": {"eps": -1.0},
        "eps=nan": {"eps": float("nan")},
        "scale=inf": {"scale": float("inf")},
    }


@pytest.mark.parametrize("message", refused())
def test_refused(message: str) -> None:
    call = {"x": torch.ones(3, 8), "eps": 1e-6} | refused()[message]
    for impl in ("reference", *KERNELS):
        with pytest.raises(ValueError) as caught:
            residual_norm(**call, impl=impl)
        assert message in str(caught.value) and str(caught.value).startswith("residual_norm: ")


def test_cost_is_every_tensor_once() -> None:
    args = arguments(6, 8)
    row, rstd, vector = nbytes(args["x"]), 6 * 4, 8 * 4
    forward, backward = cost(**args, eps=1e-6, keep_total=True)
    assert forward == (0, 4 * row + 4 * vector, 3 * row + rstd)
    # d_total, d_x_in, dh, x_in, total, branch, skip, x0; dx, dbranch, dskip, dx0
    assert backward == (0, 8 * row + rstd + 4 * vector, 4 * row + 4 * vector)
    forward, backward = cost(args["x"], branch=args["branch"], eps=1e-6)
    assert forward == (0, 2 * row, 2 * row + rstd)
    assert backward == (0, 3 * row + rstd, row)
    forward, backward = cost(args["x"], x0=args["x0"], mix=args["mix"], eps=1e-6)
    assert forward == (0, 2 * row + 2 * vector, 2 * row + rstd)
    assert backward == (0, 5 * row + rstd + 2 * vector, 2 * row + 2 * vector)
