"""Late QAT acts, in one compiled graph: bits, clip and switch are tensors; nothing recompiles."""

import pytest
import torch

from pgolf.config import ModelConfig
from pgolf.model import GPT
from pgolf.model import matrices as casts
from pgolf.model.matrices import Matrix
from pgolf.ops.int_grid import row_codes, row_step

from .test_gpt_spec import randomised

CONFIG = ModelConfig(
    vocab_size=16,
    layers=1,
    dim=16,
    heads=2,
    kv_heads=1,
    mlp_hidden=24,
    rope_dims=4,
    bigram_buckets=8,
    bigram_dim=8,
    ve_layers="0",
    ve_dim=8,
    table_dtype="fp32",
)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def prepared(grid: dict) -> tuple[GPT, list[Matrix], torch.Tensor]:
    """A model whose block matrices all carry the fake-quant of one switch."""
    model = randomised(CONFIG, torch.float32)
    switch = torch.zeros(())
    matrices = [m for m in model.blocks.modules() if isinstance(m, Matrix)]
    assert len(matrices) == 6
    for matrix in matrices:
        matrix.prepare_qat(6, switch, **grid)
    return model, matrices, switch


def decoded(weight: torch.Tensor, bits: int, factor: float, **grid: float) -> torch.Tensor:
    """The weight as an artifact would give it back."""
    clip = weight.abs().amax(1) * factor
    step = row_step(clip, bits, grid.get("floor", 0.0))
    return row_codes(weight, step, bits, full_range=grid.get("full_range", False)) * step[:, None]


@pytest.mark.parametrize("grid", [{}, {"floor": 1.0, "full_range": True}])
def test_the_loss_is_that_of_the_decoded_weights(grid: dict) -> None:
    model, matrices, switch = prepared(grid)
    plain = randomised(CONFIG, torch.float32)
    off = model(*batch())
    assert torch.equal(off, plain(*batch())), "off changes nothing"
    switch.fill_(1)  # one tensor switches every matrix
    for matrix in matrices:
        matrix.qat_clip.fill_(0.8)
        matrix.qat_bits.fill_(4.0)
    with torch.no_grad():
        for matrix in (m for m in plain.blocks.modules() if isinstance(m, Matrix)):
            matrix.weight.copy_(decoded(matrix.weight, 4, 0.8, **grid))
    assert model(*batch()).item() == plain(*batch()).item()
    assert model(*batch()).item() != off.item()


def test_gradients_pass_straight_through_to_every_matrix() -> None:
    model, matrices, switch = prepared({})
    switch.fill_(1)
    model(*batch()).backward()
    plain = randomised(CONFIG, torch.float32)
    with torch.no_grad():
        for matrix in (m for m in plain.blocks.modules() if isinstance(m, Matrix)):
            matrix.weight.copy_(decoded(matrix.weight, 6, 1.0))
    plain(*batch()).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert p.grad.abs().max() > 0, name


def test_one_graph_for_every_bits_clip_and_switch() -> None:
    from torch._dynamo.utils import counters  # slow to import, so not where tests are listed

    torch._dynamo.reset()
    counters.clear()
    model, matrices, switch = prepared({})
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = {}

    def check(label: str) -> None:
        loss = compiled(*batch())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        expected = model(*batch())
        torch.testing.assert_close(loss, expected)
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        torch.testing.assert_close(grads, wanted)
        losses[label] = loss.item()

    check("off")
    with torch._dynamo.config.patch(error_on_recompile=True):
        switch.fill_(1)
        check("6 bits")
        for matrix in matrices:
            matrix.qat_bits.fill_(4)
        check("4 bits")
        for matrix in matrices:
            matrix.qat_clip.fill_(0.5)
        check("clipped")
        switch.fill_(0)
        check("off again")
    assert counters["stats"]["unique_graphs"] == 1
    assert losses["off again"] == losses["off"]
    assert len({round(v, 6) for v in losses.values()}) == 4, losses


@pytest.mark.parametrize("clip_mask", [False, True])
def test_plain_torch_quantises_alike_matrices_as_one(clip_mask: bool, monkeypatch) -> None:
    """Those of one width and one tensor of bits; values and gradients are those of each alone."""
    model, matrices, switch = randomised(CONFIG, torch.float32), [], torch.ones(())
    attn, mlp = torch.tensor(6.0), torch.tensor(4.0)
    for name, matrix in model.blocks.named_modules():
        if isinstance(matrix, Matrix):
            bits = attn if "attn" in name else mlp
            matrix.prepare_qat(bits, switch, clip_mask=clip_mask, impl="reference")
            matrix.qat_clip.copy_(torch.linspace(0.5, 1.0, matrix.weight.size(0)))
            matrices.append(matrix)
    weights = [m.weight for m in matrices]
    g = torch.Generator().manual_seed(1)
    into = [torch.randn(w.shape, generator=g) for w in weights]
    alone = [casts.cast_all([m], torch.bfloat16)[0] for m in matrices]
    expected = torch.autograd.grad(alone, weights, [t.bfloat16() for t in into])

    calls, quantise = [], casts.fake_quant

    def counted(w: torch.Tensor, *args, **named) -> torch.Tensor:
        calls.append(w)
        return quantise(w, *args, **named)

    monkeypatch.setattr(casts, "fake_quant", counted)
    results = casts.cast_all(matrices, torch.bfloat16)
    assert sorted(tuple(w.shape) for w in calls) == [(16, 24), (24, 16), (48, 16)]
    gradients = torch.autograd.grad(results, weights, [t.bfloat16() for t in into])
    for one, other in zip((*alone, *expected), (*results, *gradients), strict=True):
        assert torch.equal(one, other)
