"""Choosing implementations, and what is said to arguments that do not fit."""

import pytest
import torch

from pgolf import extension
from pgolf.cli import main
from pgolf.errors import ConfigError
from pgolf.ops import choose as module
from pgolf.ops import (
    fake_quant,
    fake_quant_all,
    leaky_relu2_mlp,
    newton_schulz,
    residual_norm,
    rms_norm,
    scaled_copies,
    softcap_cross_entropy,
    timed,
    xsa,
)
from pgolf.ops.choose import VARIABLE, choose, choose_all, parse
from pgolf.ops.operator import OPERATORS

F32 = torch.float32


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Decisions are made once a process: forget them around every test."""
    monkeypatch.delenv(VARIABLE, raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_parse() -> None:
    assert parse("") == {}
    assert parse(" xsa=triton, newton_schulz=reference ") == {
        "xsa": "triton",
        "newton_schulz": "reference",
    }
    assert parse("reference") == dict.fromkeys(OPERATORS, "reference")
    everything = parse("triton,xsa=reference")
    assert everything["xsa"] == "reference" and everything["fake_quant"] == "triton"
    assert everything["grad_norm"] == "reference", "one word is that implementation and no other"
    assert "attention" not in everything, "none of its kernels is ours"
    assert parse("auto,xsa=cuda") == dict.fromkeys(OPERATORS, "auto") | {"xsa": "cuda"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xas=triton", "no operator 'xas', only .*embed_smear, .*fake_quant"),
        ("xsa=tritn", "xsa has no 'tritn', only auto, reference, cpu, cuda, triton"),
        ("fast", "no operator has an implementation 'fast'"),
        ("xsa=", "xsa has no ''"),
        ("=triton", "no operator ''"),
    ],
)
def test_parse_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_auto_takes_the_first_that_can_run_and_says_why(monkeypatch) -> None:
    order = OPERATORS["xsa"].preferred["cpu"]
    assert choose("xsa", "auto", "cpu", F32) == order[0]
    choose.cache_clear()
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "why_missing", lambda: "there was no compiler")
    assert choose("xsa", "auto", "cpu", F32) == ("reference", "cpu: there was no compiler")


def test_auto_on_a_dtype_that_kernels_do_not_take_is_the_reference() -> None:
    impl, reason = choose("xsa", "auto", "cpu", torch.float16)
    assert impl == "reference" and "not torch.float16" in reason
    y, v = torch.ones(1, 2, 2, 32).half(), torch.ones(1, 2, 1, 32).half()
    assert torch.equal(xsa(y, v), xsa(y, v, "reference"))


def test_the_environment_decides_what_auto_is(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "xsa=reference")
    impl, reason = choose("xsa", "auto", "cpu", F32)
    assert impl == "reference" and VARIABLE in reason
    assert choose("leaky_relu2_mlp", "auto", "cpu", F32).impl == "cpu"
    assert choose("xsa", "cpu", "cpu", F32).impl == "cpu", "what is asked for by name wins"


def test_decided_once(monkeypatch) -> None:
    assert choose("xsa", "auto", "cpu", F32).impl == "cpu"
    monkeypatch.setenv(VARIABLE, "xsa=reference")
    assert choose("xsa", "auto", "cpu", F32).impl == "cpu"


def test_a_run_chooses_for_all_operators(no_interpreter) -> None:
    chosen = choose_all("xsa=reference", "cpu", F32, False, {})
    assert chosen.keys() == OPERATORS.keys() and chosen["xsa"] == ("reference", "as asked")
    with pytest.raises(ConfigError, match="ops=triton: .*triton runs on cuda tensors"):
        choose_all("triton", "cpu", F32, False, {})


def test_auto_under_compile_has_an_order_of_its_own(monkeypatch) -> None:
    operator = OPERATORS["leaky_relu2_mlp"]
    assert choose(operator.name, "auto", "cpu", F32, compiled=True).impl == "reference"
    assert choose(operator.name, "auto", "cpu", F32, compiled=False).impl == "cpu"
    assert choose(operator.name, "cpu", "cpu", F32, compiled=True).impl == "cpu", "as asked"
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda: leaky_relu2_mlp(H, UP, DOWN, 0.5), backend=backend, fullgraph=True)()
    assert "pgolf" not in graphs[0]


def test_an_implementation_that_is_not_here(monkeypatch, no_interpreter) -> None:
    y = torch.ones(1, 2, 2, 32)
    with pytest.raises(ValueError, match="impl=metal: there is no 'metal', only cpu, cuda, triton"):
        xsa(y, y, "metal")
    with pytest.raises(ValueError, match="triton runs on cuda tensors, these are on cpu"):
        xsa(y, y, "triton")
    with pytest.raises(ValueError, match="cpu takes .* not torch.float16"):
        xsa(y.half(), y.half(), "cpu")
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "why_missing", lambda: "not built: pip install -v .")
    choose.cache_clear()
    with pytest.raises(RuntimeError, match="xsa: impl=cpu: not built: pip install -v .;"):
        xsa(y, y, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="impl=triton: torch sees no GPU here"):
        choose("xsa", "triton", "cuda", F32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    choose.cache_clear()
    with pytest.raises(RuntimeError, match="impl=triton: needs sm_80, this GPU is sm_75"):
        choose("xsa", "triton", "cuda", F32)
    assert choose("xsa", "auto", "cuda", F32).impl == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choose.cache_clear()
    assert choose("xsa", "auto", "cuda", F32).impl == "triton"


def test_an_older_build_without_a_kernel_says_so(monkeypatch) -> None:
    class Old:
        leaky_relu2 = None

    monkeypatch.setattr(extension, "load", lambda: Old)
    with pytest.raises(RuntimeError, match="this build of pgolf._C has no xsa: pip install"):
        choose("xsa", "cpu", "cpu", F32)


def test_the_reference_is_no_opaque_operator() -> None:
    """torch.compile sees through it: no pgolf operator is in the graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    y, v = torch.randn(1, 3, 2, 32), torch.randn(1, 3, 1, 32)
    for impl in ("reference", "cpu"):
        torch._dynamo.reset()
        torch.compile(lambda impl=impl: xsa(y, v, impl), backend=backend, fullgraph=True)()
    seen = ["pgolf" in str(graph.graph) for graph in graphs]
    assert seen == [False, True]


# --- arguments that do not fit --------------------------------------------------------------------

Y, V = torch.ones(2, 3, 4, 32), torch.ones(2, 3, 2, 32)
H, UP, DOWN = torch.ones(5, 6), torch.ones(8, 6), torch.ones(6, 8)
W, ONES = torch.ones(4, 8), torch.ones(4)

REFUSED = {
    "xsa: y is (3, 4, 32): it has to be (N, T, H, d)": lambda i: xsa(Y[0], V, i),
    "xsa: v is (3, 2, 32): it has to be (N, T, G, d)": lambda i: xsa(Y, V[0], i),
    "N, T and d have to be the same": lambda i: xsa(Y, V[:, :2], i),
    "4 query heads cannot be shared out over 3": lambda i: xsa(Y, torch.ones(2, 3, 3, 32), i),
    "over 0 value heads": lambda i: xsa(Y, V[:, :, :0], i),
    "heads of no elements": lambda i: xsa(Y[..., :0], V[..., :0], i),
    "v is torch.bfloat16 and y is torch.float32": lambda i: xsa(Y, V.bfloat16(), i),
    "v is on meta and y on cpu": lambda i: xsa(Y, V.to("meta"), i),
    "y is torch.int64: use a float dtype": lambda i: xsa(Y.long(), V.long(), i),
    "y is torch.float8_e4m3fn: use a float dtype": lambda i: xsa(
        Y.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn), i
    ),
    "slope=1.5: it has to be 0": lambda i: leaky_relu2_mlp(H, UP, DOWN, 1.5, impl=i),
    "slope=-0.5": lambda i: leaky_relu2_mlp(H, UP, DOWN, -0.5, impl=i),
    "slope=nan": lambda i: leaky_relu2_mlp(H, UP, DOWN, float("nan"), impl=i),
    "the input has no dimensions": lambda i: leaky_relu2_mlp(
        torch.ones(()), UP, DOWN, impl=i
    ),
    "rstd is (4,): for these rows it has to be (5,)": lambda i: leaky_relu2_mlp(
        H, UP, DOWN, 0.5, ONES, i
    ),
    "rstd is torch.float64: it has to be torch.float32": lambda i: leaky_relu2_mlp(
        H, UP, DOWN, 0.5, torch.ones(5).double(), i
    ),
    "w_up is (8,)": lambda i: leaky_relu2_mlp(H, UP[:, 0], DOWN, 0.5, impl=i),
    "w_up is (8, 5): with h (5, 6)": lambda i: leaky_relu2_mlp(H, UP[:, :5], DOWN, 0.5, impl=i),
    "w_down is (8, 6)": lambda i: leaky_relu2_mlp(H, UP, UP, 0.5, impl=i),
    "it has no elements": lambda i: leaky_relu2_mlp(H, UP[:0], DOWN[:, :0], 0.5, impl=i),
    "w_down is torch.bfloat16 and h is": lambda i: leaky_relu2_mlp(
        H, UP, DOWN.bfloat16(), 0.5, impl=i
    ),
    "g is (8,): it has to be (R, C), or (B, R, C)": lambda i: newton_schulz(UP[:, 0], impl=i),
    "its matrices have no elements": lambda i: newton_schulz(UP[:, :0], impl=i),
    "every step has three": lambda i: newton_schulz(UP, [(1.0, 2.0)], impl=i),
    "safety=inf": lambda i: newton_schulz(UP, safety=float("inf"), impl=i),
    "safety=0": lambda i: newton_schulz(UP, safety=0.0, impl=i),
    "dtype=torch.float16": lambda i: newton_schulz(UP, dtype=torch.float16, impl=i),
    "w is (8,): it has to be (rows, columns)": lambda i: fake_quant(W[0], ONES, 6, 1, impl=i),
    "rows of no elements": lambda i: fake_quant(W[:, :0], ONES, 6, 1, impl=i),
    "clip_factor is torch.float32 (3,)": lambda i: fake_quant(W, ONES[:3], 6, 1, impl=i),
    "clip_factor is torch.float64 (4,)": lambda i: fake_quant(W, ONES.double(), 6, 1, impl=i),
    "bits=3: it has to be a whole number, 4 to 8": lambda i: fake_quant(W, ONES, 3, 1, impl=i),
    "bits=9": lambda i: fake_quant(W, ONES, torch.tensor(9.0), 1, impl=i),
    "bits=5.5": lambda i: fake_quant(W, ONES, torch.tensor(5.5), 1, impl=i),
    "bits is torch.int64 ()": lambda i: fake_quant(W, ONES, torch.tensor(6), 1, impl=i),
    "on is torch.float32 (1,)": lambda i: fake_quant(W, ONES, 6, torch.ones(1), impl=i),
    "bits is on meta, w on cpu": lambda i: fake_quant(
        W, ONES, torch.ones((), device="meta"), 1, impl=i
    ),
    "floor=nan: it has to be 0 or more": lambda i: fake_quant(
        W, ONES, 6, 1, floor=float("nan"), impl=i
    ),
    "dtype=torch.int32: it has to be a float dtype": lambda i: fake_quant(
        W, ONES, 6, 1, dtype=torch.int32, impl=i
    ),
    "the list of matrices is empty": lambda i: fake_quant_all([], [], [], ONES[0], impl=i),
    "multiple=0: it has to be 1 or more": lambda i: fake_quant(W, ONES, 6, 1, multiple=0, impl=i),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str, impl: str) -> None:
    """One ValueError that names the operator, the argument, its value and what would work."""
    with pytest.raises(ValueError) as caught:
        REFUSED[message](impl)
    assert message in str(caught.value)
    assert str(caught.value).startswith(tuple(f"{name}: " for name in OPERATORS))


@pytest.mark.parametrize("other", [[[1.0]], "numpy", None])
@pytest.mark.parametrize("name", OPERATORS)
def test_arguments_that_are_no_tensors(name: str, other: object) -> None:
    """Named, with their type, and what they have to be."""
    operator = OPERATORS[name]
    args, named = operator.samples()[0].build(torch.device("cpu"), F32)
    listed = isinstance(args[0], list)
    wrong = torch.ones(2, 3).numpy() if other == "numpy" else other
    args = ([wrong] if listed else wrong, *args[1:])
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"{name}: .* is a {kind}: it has to be a torch.Tensor"):
        operator.call(*args, **named)


def test_defaults_are_the_fields_own() -> None:
    targets = torch.arange(5)
    assert torch.equal(leaky_relu2_mlp(H, UP, DOWN), leaky_relu2_mlp(H, UP, DOWN, 0.5))
    loss = softcap_cross_entropy(H, UP, targets)
    assert torch.equal(loss, softcap_cross_entropy(H, UP, targets, 30.0))
    assert torch.equal(rms_norm(H), residual_norm(H, eps=1e-6)[1])


@pytest.mark.parametrize(
    ("impl", "shape", "why"),
    [
        ("triton", (1, 1, 2, 300), "it takes at most 256 elements a head, not 300"),
        ("cpu", (1, 1, 300, 8), "it takes at most 256 query heads to a value head, not 300"),
    ],
    ids=["size", "share"],
)
def test_heads_beyond_a_kernels_limits(impl: str, shape: tuple, why: str) -> None:
    """An error by name, the reference where nobody asked for the kernel."""
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    v = y[:, :, :1]
    with pytest.raises(ValueError, match=f"xsa: impl={impl}: {why}"):
        xsa(y, v, impl)
    torch.testing.assert_close(xsa(y, v), xsa(y, v, "reference"))


def test_newton_schulz_falls_back_for_a_dtype_that_kernels_do_not_iterate_in(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "newton_schulz=triton")
    g = torch.randn(3, 5)
    expected = newton_schulz(g, dtype=torch.float64, impl="reference")
    assert torch.equal(newton_schulz(g, dtype=torch.float64), expected)
    with pytest.raises(ValueError, match="impl=triton: it cannot iterate in torch.float64"):
        newton_schulz(g, dtype=torch.float64, impl="triton")


def test_bits_out_of_range_are_nan_where_a_kernel_cannot_raise() -> None:
    """On a GPU `bits` is read by the kernel alone."""
    for bits in (3.0, 9.0, 5.5, float("nan")):
        assert fake_quant(W, ONES, torch.tensor(bits), 1, impl="triton").isnan().all(), bits


def test_doctor_lists_every_operator_with_its_reason(capsys) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in OPERATORS:
        assert any(line.startswith(f"{name} ") and "(" in line for line in lines), name


def test_a_choice_is_constant_to_the_compiler() -> None:
    """The mark is the one that torch sets, which costs an import that every command would pay."""
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked) and vars(module._resolve).items() >= vars(marked).items()


def test_copies_for_products_are_for_kernels() -> None:
    """The reference could only give the products themselves, which callers would multiply again."""
    with pytest.raises(ValueError, match="scaled_copies: impl=reference takes no products"):
        scaled_copies(torch.ones(1, 4), torch.ones(2, 4), impl="reference")


@pytest.mark.parametrize(
    "text",
    ['{"a toy"', "[]", '{"GPU": []}', '{"GPU": {"xsa": "triton"}}', '{"GPU": {"xsa": [1]}}',
     '{"GPU": {"xsa": {"impl": "triton", "reason": "it is"}}}',
     '{"GPU": {"xsa": {"impl": "triton", "reason": "it is", "sizes": {"size": "64"}}}}'],
)
def test_a_damaged_table_of_timed_operators(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(timed, "TIMED", tmp_path / "timed.json")
    assert timed.table() == {}
    timed.TIMED.write_text(text)
    with pytest.raises(ConfigError, match=r"timed\.json is damaged: delete it"):
        timed.table()


def linear_residual_of(width: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(5, 8), torch.randn(width, 8), torch.randn(5, width)


def linear_mix_of(width: int) -> tuple[torch.Tensor, ...]:
    return linear_residual_of(width)


def xsa_linear_of(width: int) -> tuple[torch.Tensor, ...]:
    heads = width // 8
    y, v = torch.randn(1, 5, heads, 8), torch.randn(1, 5, heads // 2, 8)
    return y, v, torch.randn(width, width)


def linear_qk_rope_of(width: int) -> tuple:
    angles = torch.randn(2, 5, 4)
    return torch.randn(1, 5, width), torch.randn(32, width), *angles, torch.randn(2), 2, 1


def norm_mlp_of(width: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(5, width), torch.randn(24, width) / 8, torch.randn(width, 24) / 8


@pytest.mark.parametrize(
    "arguments", [linear_residual_of, linear_mix_of, xsa_linear_of, linear_qk_rope_of, norm_mlp_of]
)
def test_sizes_that_are_timed_may_be_dynamic(arguments) -> None:
    torch._dynamo.reset()
    operator = OPERATORS[arguments.__name__.removesuffix("_of")]
    assert operator.timed
    compiled = torch.compile(operator.call, fullgraph=True, dynamic=True, backend="eager")
    for width in (16, 32, 48):
        given = arguments(width)
        torch.testing.assert_close(compiled(*given), operator.call(*given))


def test_timed_sizes_are_numbers_where_dynamo_holds_them_as_dynamic() -> None:
    """As on a GPU, where `auto` looks a verdict up by them: a constant of what is traced."""

    def looked_up(sizes: tuple) -> float:
        return float(dict(sizes)["width"])

    looked_up._dynamo_marked_constant = True

    def function(x: torch.Tensor) -> torch.Tensor:
        sizes = {"width": x.size(0)}
        return x + looked_up(module._timed_sizes("xsa_linear", "auto", "cuda", sizes))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for width in (16, 32, 48):
        assert (compiled(torch.zeros(width)) == width).all()
