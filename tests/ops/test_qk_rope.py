"""Head norm, partial RoPE and gain against the formula."""

import math

import pytest
import torch

from pgolf.ops.operator import OPERATORS
from pgolf.ops.qk_rope import cost, qk_rope, rope_table, rotate
from pgolf.ops.tensors import nbytes

from .cases import implementations
from .guards import GuardZones

LENGTH, HEADS, GROUPS, SIZE = 5, 4, 2, 8


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, LENGTH, HEADS, SIZE, generator=g, dtype=torch.float64)
    k = torch.randn(2, LENGTH, GROUPS, SIZE, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def exact_table(dims: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """rope_table in float64, entry by entry."""
    angle = [[t * base ** (-2 * j / dims) for j in range(dims // 2)] for t in range(LENGTH)]
    angle = torch.tensor(angle, dtype=torch.float64).reshape(LENGTH, dims // 2)
    return angle.cos(), angle.sin()


def rotated_by_hand(x: torch.Tensor, dims: int, base: float) -> torch.Tensor:
    """Pairs (j, j + r/2) as complex numbers turned by -t base^(-2j/r)."""
    out = x.clone()
    half = dims // 2
    for t in range(x.shape[1]):
        for j in range(half):
            pair = torch.complex(x[:, t, :, j], x[:, t, :, j + half])
            angle = t * base ** (-2 * j / dims)
            pair = pair * complex(math.cos(angle), -math.sin(angle))
            out[:, t, :, j], out[:, t, :, j + half] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("dims", [0, 2, 4, 8])
def test_rotation(dims: int) -> None:
    x, _ = inputs()
    out = rotate(x, *exact_table(dims, 100.0))
    torch.testing.assert_close(out, rotated_by_hand(x, dims, 100.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[..., dims:], x[..., dims:])
    assert torch.equal(out[:, 0], x[:, 0])


@pytest.mark.parametrize(("dims", "base"), [(16, 22081.8), (64, 10000.0), (2, 7.0)])
def test_table(dims: int, base: float) -> None:
    cos, sin = rope_table(2048, dims, base)
    assert cos.shape == sin.shape == (2048, dims // 2) and cos.dtype is torch.float32
    for t in (0, 1, 17, 2047):  # the last position too: fp32 angles would be off by 1e-4 there
        for j in range(dims // 2):
            angle = t * base ** (-2 * j / dims)
            assert cos[t, j].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[t, j].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_the_base_is_the_same_at_every_length() -> None:
    cos, sin = rope_table(2048, 16, 22081.8)
    short_cos, short_sin = rope_table(300, 16, 22081.8)
    assert torch.equal(cos[:300], short_cos) and torch.equal(sin[:300], short_sin)


def test_the_published_effective_bases() -> None:
    """10000 rescaled by (2048 / 1024)^(r / (r - 2)), as the scripts do beyond length 1024."""
    assert 10000 * 2 ** (16 / 14) == pytest.approx(22082, abs=1)
    assert 10000 * 2 ** (64 / 62) == pytest.approx(20452, abs=1)


@pytest.mark.parametrize("dims", [4, 8])
def test_scores_depend_on_distance_only(dims: int) -> None:
    cos, sin = (t.double() for t in rope_table(64, dims, 50.0))
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, SIZE, generator=g, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x.view(1, 1, 1, SIZE), cos[t : t + 1], sin[t : t + 1]).flatten()
            for x, t in ((q, at_q), (k, at_k))
        ]
        return (turned[0] @ turned[1]).item()

    for distance in (0, 1, 7):
        scores = [score(start + distance, start) for start in (0, 5, 40)]
        assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)
    assert score(3, 0) != pytest.approx(score(0, 3), abs=1e-3)


def packed(*parts: torch.Tensor) -> torch.Tensor:
    """q, k and v (N, T, heads, d) side by side, as one matmul leaves them."""
    return torch.cat([part.flatten(2) for part in parts], dim=-1)


def gains(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([1.5, -0.5, 2.0, 1.0], dtype=dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("norm", [True, False])
def test_norm_rotation_gain_and_value(norm: bool, impl: str) -> None:
    q, k = inputs()
    v, value, eps = 3 * k.flip(1), k.flip(0), 0.01
    table = exact_table(4, 100.0)
    got = qk_rope(
        packed(q, k, v), *table, gains(), HEADS, GROUPS, eps, norm, value.flatten(2), impl
    )
    if norm:
        q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    expected_q = rotated_by_hand(q, 4, 100.0) * gains().view(1, 1, HEADS, 1)
    torch.testing.assert_close(got, (expected_q, rotated_by_hand(k, 4, 100.0), v + value))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_projection(dtype: torch.dtype, impl: str) -> None:
    q, k = inputs(dtype)
    got = qk_rope(
        packed(q, k, k), *rope_table(LENGTH, 4, 100.0), gains(torch.float32),
        HEADS, GROUPS, 1e-6, impl=impl,
    )  # fmt: skip
    exact = qk_rope(
        packed(q, k, k).double(), *exact_table(4, 100.0), gains(), HEADS, GROUPS, 1e-6,
        impl="reference",
    )  # fmt: skip
    for mine, truth in zip(got, exact, strict=True):
        assert mine.dtype is dtype
        error = (mine.double() - truth).abs().max()
        assert error < 8 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_strided_inputs(impl: str) -> None:
    q, k = inputs()
    qkv, table = packed(q, k, k), exact_table(4, 100.0)
    strided = torch.cat((qkv, qkv), -1)[..., : qkv.size(-1)]
    value = k.flatten(2).transpose(0, 1).contiguous().transpose(0, 1)
    rest = (gains(), HEADS, GROUPS, 1e-6, True)
    torch.testing.assert_close(
        qk_rope(strided, *table, *rest, value, impl),
        qk_rope(qkv, *table, *rest, value.contiguous(), impl),
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("norm", [True, False])
def test_gradient(norm: bool, impl: str) -> None:
    q, k = inputs()
    table = exact_table(4, 100.0)
    leaves = [packed(q, k, -k), gains(), k.flatten(2)]

    def call(qkv, gain, value):
        return qk_rope(qkv, *table, gain, HEADS, GROUPS, 1e-6, norm, value, impl)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


# --- the kernels ----------------------------------------------------------------------------------

KERNELS = implementations(OPERATORS["qk_rope"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def arguments(
    time: int, heads: int, groups: int, size: int, dims: int, dtype: torch.dtype = torch.float32
) -> tuple:
    """Positional arguments of qk_rope up to kv_heads, for two rows."""
    g = torch.Generator().manual_seed(time + size)
    qkv = torch.randn(2, time, (heads + 2 * groups) * size, generator=g, dtype=torch.float64)
    gain = torch.linspace(0.5, 1.5, heads)
    return qkv.to(dtype), *rope_table(time, dims, 100.0), gain, heads, groups


def results(impl: str, args: tuple, upstream, norm: bool = True) -> list:
    """q, k and v, then the gradients of qkv and gain for those of q, k and v; None is none."""
    qkv, cos, sin, gain, *rest = args
    leaves = [qkv.detach().requires_grad_(), gain.detach().requires_grad_()]
    outputs = qk_rope(leaves[0], cos, sin, leaves[1], *rest, 1e-6, norm, impl=impl)
    used = [i for i, grad in enumerate(upstream) if grad is not None]
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], leaves, [upstream[i] for i in used], allow_unused=True
    )
    return [*(out.detach() for out in outputs), *gradients]


def gradients_of(args: tuple, attention_layout: bool = False) -> list:
    """Output gradients, as rows of (N, T, heads, d) memory or of (N, heads, T, d)."""
    qkv, *_, heads, groups = args
    size = qkv.size(2) // (heads + 2 * groups)
    g = torch.Generator().manual_seed(5)
    made = []
    for count in (heads, groups, groups):
        dy = torch.randn(2, qkv.size(1), count, size, generator=g).to(qkv.dtype)
        made.append(dy.transpose(1, 2).contiguous().transpose(1, 2) if attention_layout else dy)
    return made


def close(mine: list, theirs: list) -> None:
    for a, b in zip(mine, theirs, strict=True):
        if a is None or b is None:  # torch has None where nothing depends on the gain
            assert all(t is None or not t.any() for t in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@every_kernel
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 4, 64, 16), (33, 8, 4, 64, 64), (3, 4, 2, 64, 64), (2, 3, 1, 33, 6),
        (70, 2, 1, 8, 0), (2, 9, 2, 256, 250),
    ],
)  # fmt: skip
def test_shapes(impl: str, shape: tuple) -> None:
    """One token and more than a block's, no and full rotation, sizes that no vector divides."""
    args = arguments(*shape)
    upstream = gradients_of(args, attention_layout=True)
    close(results(impl, args, upstream), results("reference", args, upstream))


@every_kernel
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_that_are_missing(impl: str, norm: bool, missing: tuple) -> None:
    args = arguments(3, 4, 2, 16, 8)
    upstream = [None if i in missing else t for i, t in enumerate(gradients_of(args))]
    close(results(impl, args, upstream, norm), results("reference", args, upstream, norm))


@every_kernel
def test_any_address(impl: str) -> None:
    """Memory that starts off a 16-byte boundary gives the bits of memory that does not."""
    args = arguments(3, 4, 2, 64, 16)
    off = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in args[:4]]
    assert all(t.data_ptr() % 16 for t in off)
    upstream = gradients_of(args)
    close(results(impl, (*off, *args[4:]), upstream), results(impl, args, upstream))


@every_kernel
@pytest.mark.parametrize(("size", "dims"), [(64, 16), (33, 6)])
def test_nothing_is_written_outside(impl: str, size: int, dims: int) -> None:
    args = arguments(35, 3, 1, size, dims)
    with GuardZones():
        results(impl, args, gradients_of(args))


@every_kernel
def test_a_nan_stays_in_its_head(impl: str) -> None:
    args = arguments(4, 4, 2, 16, 8)
    args[0].view(2, 4, 8, 16)[1, 2, 1, 15] = float("nan")
    q, k, v, dqkv, d_gain = results(impl, args, gradients_of(args))
    assert q.isnan().sum() == q[1, 2, 1].isnan().sum() == 16
    assert not k.isnan().any() and not v.isnan().any()
    assert dqkv.isnan().sum() == dqkv[1, 2, 16:32].isnan().sum() == 16
    assert d_gain.isnan().tolist() == [False, True, False, False]


@every_kernel
@pytest.mark.parametrize("place", [3, 9, 40])
def test_an_infinity_stays_in_its_pair(impl: str, place: int) -> None:
    """Its head is 0 elsewhere: what is beside the pair in other lanes has no part in them."""
    args = arguments(2, 8, 4, 64, 16)
    args[0].view(2, 2, 16, 64)[1, 0, 9, place] = float("inf")
    q, k, v, _, _ = results(impl, args, gradients_of(args))
    hit = {place, (place + 8) % 16} if place < 16 else {place}
    assert {tuple(at) for at in k.isnan().nonzero().tolist()} == {(1, 0, 1, i) for i in hit}
    assert not q.isnan().any() and not v.isnan().any()
    assert (k[1, 0, 1].nan_to_num() == 0).all()


@every_kernel
def test_without_norm_a_nan_stays_in_its_pair(impl: str) -> None:
    args = arguments(2, 2, 1, 16, 8)
    args[0].view(2, 2, 4, 16)[1, 0, 0, 5] = float("nan")
    q, k, v, dqkv, d_gain = results(impl, args, gradients_of(args), norm=False)
    assert q.isnan().nonzero().tolist() == [[1, 0, 0, 1], [1, 0, 0, 5]]
    assert not any(t.isnan().any() for t in (k, v, dqkv))
    assert d_gain.isnan().tolist() == [True, False]


@pytest.mark.skipif("cpu" not in KERNELS, reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    args = arguments(2000, 8, 4, 64, 16, dtype)
    upstream = gradients_of(args)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results("cpu", args, upstream))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_heads_beyond_the_kernels_limit() -> None:
    """An error by name, the reference where nobody asked for the kernel."""
    args = arguments(2, 1, 1, 260, 16)
    with pytest.raises(ValueError, match="at most 256 elements a head, not 260"):
        qk_rope(*args, 1e-6, impl="cpu")
    torch.testing.assert_close(qk_rope(*args, 1e-6), qk_rope(*args, 1e-6, impl="reference"))


def refused() -> dict:
    """Message -> the call that has to fail with it."""
    qkv, cos, sin, gain, heads, groups = arguments(3, 4, 2, 16, 8)
    rest = (heads, groups, 1e-6)
    value = qkv[..., :32]
    return {
        "heads=0, kv_heads=2": lambda i: qk_rope(qkv, cos, sin, gain, 0, 2, 1e-6, impl=i),
        "qkv is (3, 128): it has": lambda i: qk_rope(qkv[0], cos, sin, gain, *rest, impl=i),
        "(N, T, 8 d)": lambda i: qk_rope(qkv[..., :100], cos, sin, gain, *rest, impl=i),
        "cos is (2, 4)": lambda i: qk_rope(qkv, cos[:2], sin, gain, *rest, impl=i),
        "sin is (3, 3)": lambda i: qk_rope(qkv, cos, sin[:, :3], gain, *rest, impl=i),
        "an r of at most 16": lambda i: qk_rope(
            qkv, *rope_table(3, 18, 9.0), gain, *rest, impl=i
        ),
        "gain is (3,)": lambda i: qk_rope(qkv, cos, sin, gain[:3], *rest, impl=i),
        "cos is torch.float64 on cpu: it has to be torch.float32": lambda i: qk_rope(
            qkv, cos.double(), sin, gain, *rest, impl=i
        ),
        "eps=-1": lambda i: qk_rope(qkv, cos, sin, gain, heads, groups, -1.0, impl=i),
        "value is torch.bfloat16": lambda i: qk_rope(
            qkv, cos, sin, gain, *rest, value=value.bfloat16(), impl=i
        ),
        "value is (2, 3, 31)": lambda i: qk_rope(
            qkv, cos, sin, gain, *rest, value=value[..., :31], impl=i
        ),
    }


@pytest.mark.parametrize("message", refused())
def test_refused(message: str) -> None:
    for impl in ("reference", *KERNELS):
        with pytest.raises(ValueError) as caught:
            refused()[message](impl)
        assert message in str(caught.value) and str(caught.value).startswith("qk_rope: ")


def test_cost_is_every_tensor_once() -> None:
    args = arguments(3, 4, 2, 16, 8)
    qkv, *small = args[:4]
    token_head = 2 * 3 * 16 * 4
    value = qkv[..., :32].contiguous()
    forward, backward = cost(*args, 1e-6, value=value)
    assert forward == (0, nbytes(qkv, value, *small), nbytes(qkv))
    assert backward == (0, nbytes(qkv, *small) + 6 * token_head, nbytes(qkv, small[2]))
    assert cost(*args, 1e-6, norm=False)[1].read == nbytes(qkv, *small) + 4 * token_head
