"""What the kernels of rows refuse, on the CPU and on a GPU alike."""

import pytest
import torch

from pgolf import extension

TOKENS = {"n": 1, "t": 2}
ROPE = {**TOKENS, "dtype": 0, "h": 2, "g": 1, "d": 8, "half": 2, "eps": 1e-6, "norm": True}
SMEAR = {**TOKENS, "table_dtype": 0, "x_dtype": 0, "vocab": 3, "width": 8, "eps": 1e-6,
         "bigram_rows": 3}  # fmt: skip
RESIDUAL = {"rows": 2, "width": 8, "dtype": 0, "scale": 1.0, "eps": 1e-6, "factored": False}
STRIDES = dict.fromkeys(
    ("dq_strides", "dk_strides", "dv_strides", "dv_again_strides"), (32, 16, 8)
)
# Sizes and numbers, pointers that have to be there, pointers that may be null.
KERNELS = {
    "qk_rope": ({**ROPE, "value_rows": 3}, "qkv cos sin gain q k v", "value factor value_ids"),
    "qk_rope_backward": (
        {**ROPE, **STRIDES, "partial_rows": 1},
        "qkv cos sin gain dqkv partials",
        "dq dk dv dv_again factor",
    ),
    "qk_rope_backward_of_results": (
        {**{n: v for n, v in ROPE.items() if n not in ("eps", "norm")}, **STRIDES,
         "partial_rows": 1},
        "q k rstd cos sin gain dqkv partials",
        "dq dk dv dv_again factor",
    ),
    "embed_smear": (SMEAR, "ids table x rstd", "bigram scale gate starts bigram_ids"),
    "embed_smear_backward": (
        {**SMEAR, "piece_rows": 2, "partial_rows": 1},
        "ids table order bounds dx rstd dtable sums pieces partials",
        "bigram scale gate starts dbigram bigram_ids",
    ),
    "token_sums": (
        {"dtype": 0, "tokens": 2, "vocab": 3, "width": 8, "stride": 8}, "order bounds x sums",
        "divisors",
    ),
    "residual_norm": (
        RESIDUAL, "x h rstd", "branch branch_scale skip skip_weight x0 mix0 mix1 total x_in",
    ),
    "residual_norm_backward": (
        {**RESIDUAL, "partial_rows": 1},
        "total branch branch_scale skip skip_weight x0 mix0 mix1 total_scale x_in_scale x_in rstd "
        "dx dbranch dskip dx0 partials",
        "d_total d_x_in dh",
    ),
}
# Without one of these the kernel has less to do, and no reason to refuse.
MAY_BE_NULL = {
    "residual_norm_backward": (
        "branch_scale", "skip_weight", "mix0", "mix1", "total_scale", "x_in_scale",
    ),
}  # fmt: skip
SIZES = ("n", "t", "h", "g", "d", "vocab", "rows", "width")
HUGE = 2**62
every_kernel = pytest.mark.parametrize("name", KERNELS)


def callers(name: str) -> list:
    """Functions of the arguments without threads or stream."""
    if extension.load() is None:
        pytest.skip(extension.why_missing())
    found = [lambda **a: getattr(extension.load(), name)(**a, threads=1)]
    if extension.emulates_cuda():
        found.append(lambda **a: getattr(extension.cuda(), f"{name}_cuda")(**a, stream=0))
    return found


def arguments(name: str) -> tuple[dict, list[torch.Tensor]]:
    """Good ones, and the memory behind their pointers: zeros, which are ids and an order, too."""
    numbers, needed, optional = KERNELS[name]
    memory = [torch.zeros(256) for _ in needed.split()]
    pointers = dict(zip(needed.split(), (m.data_ptr() for m in memory), strict=True))
    return {**numbers, **pointers, **dict.fromkeys(optional.split(), 0)}, memory


def refusal(call, given: dict) -> str:
    with pytest.raises(ValueError) as caught:
        call(**given)
    return str(caught.value)


@every_kernel
def test_good_arguments_and_missing_pointers(name: str) -> None:
    given, _memory = arguments(name)
    for call in callers(name):
        call(**given)
        for pointer in set(KERNELS[name][1].split()) - set(MAY_BE_NULL.get(name, ())):
            message = refusal(call, given | {pointer: 0})
            assert message.startswith(f"{pointer} is a null pointer: it has to hold "), message


@every_kernel
def test_sizes(name: str) -> None:
    given, _memory = arguments(name)
    for call in callers(name):
        for size in {*SIZES} & KERNELS[name][0].keys():
            assert refusal(call, given | {size: -1}) == f"{size} is -1: a size is not negative"
            message = refusal(call, given | {size: HUGE})
            assert "with the other sizes it makes more" in message or "may have" in message
        for rows in {"partial_rows", "piece_rows"} & given.keys():
            assert refusal(call, given | {rows: 3}).startswith(f"{rows} is 3: it has to be ")
        for strides in STRIDES.keys() & given.keys():
            message = refusal(call, given | {strides: (32, -1, 8)})
            assert message == f"{strides} is -1: a stride is not negative"
        tokens = {"t", "rows", "partial_rows", "piece_rows"}
        call(**given | dict.fromkeys(tokens & given.keys(), 0))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("qk_rope", {"d": 257}, "d is 257: heads may have at most 256 elements"),
        ("qk_rope", {"half": 5}, "half is 5: heads of 8 elements"),
        ("qk_rope_backward", {"half": -1}, "half is -1"),
        # Of more tokens than 64 for each of 1024 sums.
        ("qk_rope_backward", {"t": 70_000, "partial_rows": 1094}, "partial_rows is 1094: it has"),
        ("qk_rope", {"dtype": 3}, "dtype is 3: it has to be 0 (fp32)"),
        ("embed_smear", {"width": 769}, "width is 769: rows may have 1 to 768"),
        ("embed_smear_backward", {"width": 0}, "width is 0: rows may have 1 to 768"),
        ("residual_norm", {"width": 4097}, "width is 4097: it may be at most 4096"),
        ("residual_norm", {"mix1": 64}, "x0 is a null pointer"),
        ("residual_norm", {"skip_weight": 64}, "skip is a null pointer"),
        ("embed_smear", {"x_dtype": 4}, "x_dtype is 4"),
    ],
)
def test_wrong_values(name: str, wrong: dict, message: str) -> None:
    given, _memory = arguments(name)
    for call in callers(name):
        assert refusal(call, given | wrong).startswith(message)


def test_fp64_is_for_both_or_none_and_not_for_a_gpu() -> None:
    given, _memory = arguments("embed_smear")
    on_cpu, *on_gpu = callers("embed_smear")
    message = refusal(on_cpu, given | {"table_dtype": 2})
    assert message == "table_dtype is 2: both or none of table_dtype and x_dtype may be 2 (fp64)"
    for call in on_gpu:
        both = given | {"table_dtype": 2, "x_dtype": 2}
        assert refusal(call, both) == "table_dtype is 2: it has to be 0 (fp32) or 1 (bf16)"
