"""documents=true: a model on several documents is that model on each of them alone."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from pgolf.artifact.load import load_model
from pgolf.artifact.pack import write_artifact
from pgolf.config import ArtifactConfig, QuantConfig
from pgolf.errors import DataError
from pgolf.model import GPT
from pgolf.model.decode import generate
from pgolf.model.frozen import frozen_copy
from pgolf.ops.operator import OPERATORS
from pgolf.quant.quantize import quantize
from pgolf.scoring.windows import evaluate, windows

from .published import PUBLISHED, small
from .test_gpt_spec import gradients, randomised

BOS, LENGTH = 3, 24
WHERE = {
    "none": [], "first": [0], "middle": [7, 15], "neighbours": [6, 7, 8], "last": [LENGTH - 1],
    "all": list(range(LENGTH)),
}  # fmt: skip
CONFIG = small(
    PUBLISHED["pr1473"], layers=2, ve_layers="1", documents=True, bos_id=BOS, smear="plain"
)


def on(impl: str, dtype: torch.dtype = torch.float64) -> GPT:
    """The same random weights, with attention by `impl` and C++ elsewhere; RoPE in float64."""
    twin = randomised(CONFIG, dtype)
    ops = {n: "cpu" for n, o in OPERATORS.items() if "cpu" in o.implementations}
    ops = (ops if impl == "varlen" else {}) | {"attention": impl}
    model = GPT(CONFIG, dtype, LENGTH, ops).to(dtype)
    model.load_state_dict(twin.state_dict())
    if dtype == torch.float64:  # relative positions are relative to the last digits
        pairs = torch.arange(0, CONFIG.rope_dims, 2).double() / CONFIG.rope_dims
        turns = torch.arange(LENGTH)[:, None] * CONFIG.rope_base**-pairs
        model.rope_cos, model.rope_sin = turns.cos(), turns.sin()
    return model


def sequences(where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences, of which the first has documents there, and their targets."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(BOS + 1, CONFIG.vocab_size, (2, LENGTH), generator=g)
    ids[0, WHERE[where]] = BOS
    return ids, torch.randint(CONFIG.vocab_size, (2, LENGTH), generator=g)


def alone(model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (2, T) of each document by itself, of a model that knows no documents."""
    losses = []
    for row, wanted in zip(ids, targets, strict=True):
        starts = [0, *(t for t in range(1, LENGTH) if row[t] == BOS), LENGTH]
        each = [model(row[None, a:b], wanted[None, a:b], b - a)[0] for a, b in pairwise(starts)]
        losses.append(torch.cat(each))
    return torch.stack(losses)


def without_documents(model: GPT) -> GPT:
    """A BOS is then nothing but a token, and no document begins at one."""
    config = small(PUBLISHED["pr1473"], layers=2, ve_layers="1", bos_id=BOS, smear="plain")
    plain = GPT(config, model.compute_dtype, LENGTH, model.ops | {"attention": "reference"})
    plain.to(model.compute_dtype).load_state_dict(model.state_dict())
    plain.rope_cos, plain.rope_sin = model.rope_cos, model.rope_sin
    return plain


@pytest.mark.parametrize("impl", ["reference", "varlen"])
@pytest.mark.parametrize("where", WHERE)
def test_loss_and_every_gradient_are_those_of_each_document_alone(where: str, impl: str) -> None:
    model, (ids, targets) = on(impl), sequences(where)
    plain = without_documents(on("reference"))
    actual, expected = model(ids, targets), alone(plain, ids, targets).mean()
    # logits are capped in fp32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=0)
    mine, theirs = (
        gradients(loss, dict(m.named_parameters()))
        for m, loss in ((model, actual), (plain, expected))
    )
    for name, grad in theirs.items():
        assert (mine[name] - grad).norm() <= 1e-6 * grad.norm(), name
    if where not in ("none", "first"):
        assert abs(plain(ids, targets) - expected) > 1e-4 * expected, "it would not be noticed"


def test_no_token_reaches_beyond_its_document() -> None:
    model, (ids, _) = on("varlen", torch.float32), sequences("middle")
    with torch.no_grad():
        before = model.features(ids)
        ids[0, 9] = BOS + 1 + (ids[0, 9] - BOS) % 4
        touched = (model.features(ids) != before).any(-1)
    assert touched[0].tolist() == [9 <= t < 15 for t in range(LENGTH)] and not touched[1].any()


@pytest.mark.slow
def test_one_graph_takes_any_documents() -> None:
    torch._dynamo.reset()
    model = on("varlen", torch.float32)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for where in WHERE:
            ids, targets = sequences(where)
            torch.testing.assert_close(compiled(ids, targets), model(ids, targets))


class OneByte:
    """One byte a target."""

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        return np.ones_like(target)


def test_windows_score_as_one_would() -> None:
    """A document that begins in a window is seen from there on, whatever the window had before."""
    model, g = on("varlen", torch.float32), np.random.default_rng(1)
    tokens = g.integers(BOS + 1, CONFIG.vocab_size, 80)
    tokens[[0, 11, 12, 40, 70]] = BOS
    length, starts, scored = windows(79, LENGTH, 5)
    expected = 0.0
    with torch.no_grad():
        for start, count in zip(starts.tolist(), scored.tolist(), strict=True):
            part = torch.from_numpy(tokens[start : start + length + 1])
            for t in range(length - count, length):
                begin = max((i for i in range(t + 1) if part[i] == BOS), default=0)
                own, wanted = part[None, begin : t + 1], part[None, begin + 1 : t + 2]
                expected += model(own, wanted, last=1).item()
    assert evaluate(model, tokens, OneByte(), LENGTH, 5, 3 * LENGTH).nll == pytest.approx(expected)


def test_more_documents_than_a_package_has_room_for_are_not_scored() -> None:
    model = on("reference", torch.float32)
    model.ops["attention"] = "fa3"
    tokens = np.full(201, BOS)
    assert model.most_documents(200) == 64 and without_documents(model).most_documents(200) == 0
    with pytest.raises(DataError, match="of 200 tokens holds 200 documents, .* has room for 64"):
        evaluate(model, tokens, OneByte(), 200, 200, 200)


@pytest.mark.parametrize("batch", [1, 3])
def test_text_goes_on_inside_of_its_document(batch: int) -> None:
    """What stood before the last BOS, of the prompt or made up, changes nothing of what follows."""
    model = frozen_copy(on("varlen"))
    g = torch.Generator().manual_seed(9)
    prompt = torch.randint(BOS + 1, CONFIG.vocab_size, (batch, 6), generator=g)
    prompt[:, 3] = BOS
    chances = torch.rand(batch, 14, generator=g, dtype=torch.float64)
    made = generate(model, prompt, 14, LENGTH, CONFIG.vocab_size, 1.5, chances)
    short = generate(model, prompt[:, 3:], 14, LENGTH, CONFIG.vocab_size, 1.5, chances)
    assert torch.equal(made[:, 3:], short)
    made[:, 12] = BOS
    own = generate(model, made[:, 12:13], 6, LENGTH, CONFIG.vocab_size)
    assert torch.equal(generate(model, made[:, :13], 6, LENGTH, CONFIG.vocab_size)[:, 12:], own)


def test_an_artifact_keeps_the_setting(tmp_path) -> None:
    model = on("reference", torch.float32)
    quantised = quantize(model.export_state(), QuantConfig(small_numel=0))
    meta = {
        "model": dataclasses.asdict(CONFIG), "seq_len": LENGTH, "corpus": "x",
        "tokenizer_sha256": "0" * 64,
    }  # fmt: skip
    write_artifact(tmp_path / "artifact", quantised, meta, ArtifactConfig(codec="zstd"))
    loaded, _ = load_model(tmp_path / "artifact", torch.device("cpu"), torch.float32)
    assert loaded.config.documents and loaded.ops["attention"] == "varlen"
    ids, targets = sequences("middle")
    plain = without_documents(loaded)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids, targets, LENGTH), alone(plain, ids, targets), rtol=1e-4, atol=1e-5
        )
