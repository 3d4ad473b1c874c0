"""Hessians and moments against an independent model whose products write down what they see."""

import pytest
import torch
import torch.distributed as dist

from pgolf.errors import ConfigError, TrainingError
from pgolf.model import GPT
from pgolf.quant.hessians import Calibration, collect
from pgolf.ranks import Ranks

from ..model import spec_model
from ..model.published import PUBLISHED, small
from ..model.test_gpt_spec import CASES, TIME, randomised

COUNT = 3


class Spy:
    """A weight that keeps what it is multiplied by, what comes out, and which rows are read."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.shape = weight.shape
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.rows: list[tuple[int, torch.Tensor]] = []

    @property
    def T(self) -> "Spy":  # noqa: N802
        return self

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        y.retain_grad()
        self.inputs.append(x.detach().reshape(-1, x.shape[-1]))
        self.outputs.append(y)
        return y

    def __getitem__(self, row: int) -> torch.Tensor:
        read = self.weight[row]
        read.retain_grad()
        self.rows.append((row, read))
        return read

    def hessian(self, tokens: int) -> torch.Tensor:
        x = torch.cat(self.inputs)
        assert len(x) == tokens
        return sum(torch.outer(row, row) for row in x) / tokens

    def moments(self, tokens: int) -> torch.Tensor:
        g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in self.outputs])
        return sum(row * row for row in g) / tokens

    def squares(self, tokens: int) -> torch.Tensor:
        """Mean over tokens of |gradient by the row that is read|^2, (R,)."""
        squares = torch.zeros(len(self.weight), dtype=self.weight.dtype)
        for row, read in self.rows:
            squares[row] += read.grad.square().sum()
        return squares / tokens

    def read(self, tokens: int) -> torch.Tensor:
        """Mean of g gᵀ over the rows that are read, g the gradient."""
        return sum(torch.outer(read.grad, read.grad) for _, read in self.rows) / tokens


def text(model: GPT) -> torch.Tensor:
    g = torch.Generator().manual_seed(8)
    return torch.randint(model.config.vocab_size, (COUNT, TIME + 1), generator=g)


def spied(model: GPT, tokens: torch.Tensor) -> dict[str, Spy]:
    """One pass of the specification's model with every matrix a spy."""
    params = dict(model.named_parameters())
    spies = {n: Spy(p) for n, p in params.items() if n.endswith(".weight")}
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    loss = spec_model.loss({**params, **spies}, model.config, ids, targets)
    (loss * targets.numel()).backward()
    return spies


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "name", [*PUBLISHED, "untied", "smear_off", "backout", "bigram_full_width", "one_layer"]
)
def test_against_spies_in_an_independent_model(name: str) -> None:
    model = randomised(CASES[name], torch.float64)
    tokens = text(model)
    statistics = collect(model, tokens, 2 * TIME, dtype=torch.float64, progress=False)
    spies = spied(model, tokens)
    assert statistics.tokens == COUNT * TIME
    assert statistics.hessians.keys() == statistics.moments.keys() == spies.keys()
    for key, spy in spies.items():
        hessian, moments = statistics.hessians[key], statistics.moments[key]
        assert hessian.dtype == moments.dtype == torch.float32
        if not spy.rows:
            close(hessian, spy.hessian(statistics.tokens))
            close(moments, spy.moments(statistics.tokens))
            continue
        read, rows = spy.read(statistics.tokens), spy.squares(statistics.tokens)
        if spy.outputs:  # the tied table: what it costs in both places, by rows and by columns
            out = spy.hessian(statistics.tokens)
            rows = rows + spy.moments(statistics.tokens) * out.trace()
            read = read + spy.moments(statistics.tokens).sum() * out
        close(hessian, read)
        close(moments.double() * hessian.double().trace(), rows)


def test_q_k_and_v_share_one_hessian() -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    h = collect(model, text(model), 64, progress=False).hessians
    for i in range(model.config.layers):
        q, k, v = (h[f"blocks.{i}.attn.c_{c}.weight"] for c in "qkv")
        assert q is k is v


def same(a: Calibration, b: Calibration, rtol: float) -> None:
    assert a.tokens == b.tokens and a.hessians.keys() == b.hessians.keys()
    for part in ("hessians", "moments"):
        for name, value in getattr(a, part).items():
            other = getattr(b, part)[name]
            atol = rtol * value.abs().max().item()
            torch.testing.assert_close(other, value, rtol=rtol, atol=atol, msg=name)


def test_batches_and_ranks_change_nothing_but_the_rounding(monkeypatch) -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    tokens = text(model)
    alone = collect(model, tokens, 10**6, progress=False)
    same(alone, collect(model, tokens, 1, progress=False), 1e-5)

    sums: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda t: sums.append(t.clone()))
    collect(model, tokens, 1, ranks=Ranks(1, 2, torch.device("cpu")), progress=False)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.add_(sums.pop(0)))
    first = Ranks(0, 2, torch.device("cpu"))
    same(alone, collect(model, tokens, 1, ranks=first, progress=False), 1e-5)
    assert not sums


def test_a_rank_without_a_sequence_adds_nothing(monkeypatch) -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", sums.append)
    collect(model, text(model)[:1], 64, ranks=Ranks(0, 2, torch.device("cpu")), progress=False)
    assert sums and not any(t.any() for t in sums)


def test_the_model_is_left_alone() -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    collect(model, text(model), 64, progress=False)
    assert all(block.published is None for block in model.blocks)
    for name, p in model.named_parameters():
        assert p.requires_grad and p.grad is None and torch.equal(p, before[name]), name


def test_bad_input() -> None:
    model = randomised(small(PUBLISHED["pr478"]), torch.float32)
    with pytest.raises(ConfigError, match=r"calibration on \(0, 8\) tokens"):
        collect(model, torch.zeros(0, 8, dtype=torch.int64), 64)
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"blocks\.0\.\S+ are not finite"):
        collect(model, text(model), 64, progress=False)
