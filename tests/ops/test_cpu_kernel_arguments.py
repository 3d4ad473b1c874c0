"""What pgolf._C's CPU kernels refuse, and sizes of zero, which they accept."""

import os
import subprocess
import sys

import pytest
import torch

from . import cpu_kernels as call

HUGE = 2**62


@pytest.fixture
def address():
    """Of room enough for every call below that is not refused, full of zeros."""
    room = torch.zeros(8192)
    yield room.data_ptr()
    assert not room.any(), "a refused call wrote"


def arguments(name: str, address: int) -> dict:
    """Good arguments of a kernel, each on four rows of eight (or on (1, 2, 2, 8) for xsa)."""
    heads = {"dtype": 0, "n": 1, "t": 2, "h": 2, "g": 1, "d": 8, "threads": 1}
    rows = {"dtype": 0, "rows": 4, "cols": 8, "threads": 1}
    rest = {
        "xsa": heads | {"y_strides": (32, 16, 8), "v_strides": (16, 8, 8)},
        "xsa_backward": heads
        | {"dz_strides": (32, 16, 8), "y_strides": (32, 16, 8), "v_strides": (16, 8, 8)},
        "leaky_relu2": rows | {"slope": 0.5, "rstd": 0},
        "leaky_relu2_backward": rows | {"slope": 0.5, "rstd": 0},
        "newton_schulz_normalize": {
            **{"g_dtype": 0, "x_dtype": 0, "b": 1, "r": 4, "c": 8, "g_strides": (32, 8, 1)},
            **{"row_norm": False, "safety": 1.0, "threads": 1},
        },
    }[name]
    return dict.fromkeys(POINTERS[name], address) | rest


POINTERS = {
    "xsa": ("y", "v", "z"),
    "xsa_backward": ("dz", "y", "v", "dy", "dv"),
    "leaky_relu2": ("pre", "post", "bits"),
    "leaky_relu2_backward": ("dpost", "post", "bits", "dpre"),
    "newton_schulz_normalize": ("g", "x"),
}
SIZES = {"xsa": "nthgd", "xsa_backward": "nthgd", "newton_schulz_normalize": "brc"}
every_kernel = pytest.mark.parametrize("name", POINTERS)


def refusal(kernels, name: str, arguments: dict) -> str:
    with pytest.raises(ValueError) as caught:
        getattr(kernels, name)(**arguments)
    return str(caught.value)


@every_kernel
def test_good_arguments_are_accepted(kernels, name, address):
    """So that the refusals below have the reason that they name. (All zeros stay zeros.)"""
    getattr(kernels, name)(**arguments(name, address))


@every_kernel
def test_null_pointers_and_negative_sizes(kernels, name, address):
    for pointer in POINTERS[name]:
        message = refusal(kernels, name, arguments(name, address) | {pointer: 0})
        assert message.startswith(f"{pointer} is a null pointer: it has to hold "), message
    for size in SIZES.get(name, ("rows", "cols")):
        message = refusal(kernels, name, arguments(name, address) | {size: -1})
        assert message == f"{size} is -1: a size is not negative"
        if size not in "hg":
            message = refusal(kernels, name, arguments(name, address) | {size: HUGE})
            assert f"is {HUGE}: with the other sizes" in message or "more elements" in message
    message = refusal(kernels, name, arguments(name, address) | {"threads": 0})
    assert message == "threads is 0: it has to be at least 1"


@pytest.mark.parametrize(
    ("name", "argument", "value", "remedy"),
    [
        ("xsa", "dtype", 3, "it has to be 0 .fp32., 1 .bf16. or 2 .fp64."),
        ("leaky_relu2", "dtype", -1, "it has to be 0 .fp32."),
        ("newton_schulz_normalize", "x_dtype", 7, "it has to be 0 .fp32."),
        ("xsa", "h", 3, None),
        ("xsa", "g", 0, None),
    ],
)
def test_wrong_values(kernels, name, argument, value, remedy, address):
    call_with = arguments(name, address)
    if name == "xsa" and remedy is None:
        call_with["g"] = 2  # which 3 is no multiple of; and 2 is none of 0
        remedy = f"it has to be a multiple of g, which is {2 if argument == 'h' else 0}"
        named = "h is 3" if argument == "h" else "h is 2"
    else:
        named = f"{argument} is {value}"
    message = refusal(kernels, name, call_with | {argument: value})
    assert message.startswith(named) and remedy.replace(".", "") in message.replace(
        "(", ""
    ).replace(")", ""), message


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("xsa", "y_strides", (32, -16, 8), "y_strides is -16: a stride is not negative"),
        ("xsa_backward", "dz_strides", (32, HUGE, 8), "dz_strides is .*: it leads beyond"),
        ("newton_schulz_normalize", "g_strides", (32, 8, 2), "g_strides.2. is 2: it has to be 1"),
        ("newton_schulz_normalize", "g_strides", (32, -8, 1), "g_strides is -8: a stride is not"),
    ],
)
def test_wrong_strides(kernels, name, argument, value, message, address):
    with pytest.raises(ValueError, match=message):
        getattr(kernels, name)(**arguments(name, address) | {argument: value})


def test_too_many_heads_on_one_value_head(kernels, address):
    many = arguments("xsa", address) | {"h": 257}
    assert refusal(kernels, "xsa", many) == (
        "h is 257: at most 256 query heads may share a value head, and g is 1"
    )


def test_the_most_heads_on_one_value_head(kernels):
    y, v = torch.randn(1, 2, 256, 8), torch.randn(1, 2, 1, 8)
    dy, dv = call.xsa_backward(kernels, y, y, v)
    halves = [call.xsa_backward(kernels, half, half, v) for half in y.split(128, 2)]
    assert torch.equal(dy, torch.cat([half[0] for half in halves], 2))
    torch.testing.assert_close(dv, halves[0][1] + halves[1][1], rtol=1e-4, atol=1e-3)


@every_kernel
def test_sizes_of_zero_write_nothing(kernels, name, address):
    sizes = SIZES.get(name, ("rows", "cols"))
    for empty in ("h", "n", "t", "d") if "h" in sizes else sizes:
        nothing = arguments(name, address) | {empty: 0}
        getattr(kernels, name)(**nothing)
        if empty not in "h":  # v is still there without query heads
            getattr(kernels, name)(**nothing | dict.fromkeys(POINTERS[name], 0))


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "best"])
def test_an_unknown_instruction_set_is_refused(isa, kernels):
    code = (
        "from pgolf import _C\n"
        "for call in (_C.cpu_isa, lambda: _C.leaky_relu2(0, 0, 0, 0, 0, 0, 0, 0.5, 1)):\n"
        "    try: call()\n"
        "    except ValueError as e: print(e)"
    )
    env = os.environ | {"PGOLF_CPU_ISA": isa}
    output = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    messages = output.splitlines()
    assert len(messages) == 2 and messages[0] == messages[1]
    assert messages[0].startswith(f"PGOLF_CPU_ISA is {isa}, which this CPU does not have or")
    assert "choose one of " in messages[0] and "plain" in messages[0]
