"""Decoding with caches is the whole forward pass, for every option of the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.errors import ConfigError
from pgolf.model import GPT, decode
from pgolf.model.decode import Decoder, generate, pick
from pgolf.model.frozen import frozen_copy
from pgolf.model.matrices import Matrix

from .published import PUBLISHED, small
from .test_forms import fused
from .test_gpt_spec import CASES, TIME, randomised


def sequences(model: GPT, batch: int, time: int) -> torch.Tensor:
    c = model.config
    ids = torch.randint(c.vocab_size, (batch, time), generator=torch.Generator().manual_seed(3))
    ids[-1, time // 2] = c.bos_id  # a document start inside a row
    return ids


def whole(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) without caches."""
    with torch.no_grad():
        return model.logits(model.features(ids))


def cached(
    model: GPT, ids: torch.Tensor, read: int, length: int = TIME, stride: int = 1
) -> torch.Tensor:
    """Logits (B, T - max(read, 1) + 1, V) where `read` tokens are read in one pass."""
    decoder = Decoder(model, len(ids), length)
    decoder.stride = stride
    logits = [decoder.read(ids[:, :read])] if read else []
    logits += [decoder.step(ids[:, t]) for t in range(read, ids.size(1))]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", CASES)
def test_every_position_has_the_logits_of_the_whole_pass(name: str) -> None:
    """In fp64, to the last digits: the two are one function."""
    model = randomised(CASES[name], torch.float64)
    ids = sequences(model, 2, TIME)
    expected = whole(model, ids)
    assert expected.std() > 0.1, "logits that are all alike would prove nothing"
    frozen = frozen_copy(model)
    torch.testing.assert_close(cached(frozen, ids, 0), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(cached(frozen, ids, 4), expected[:, 3:], rtol=1e-11, atol=1e-11)


@settings(max_examples=12)
@given(
    st.sampled_from(list(PUBLISHED)), st.integers(1, 5), st.integers(1, TIME), st.integers(0, TIME),
    st.integers(1, TIME),
)  # fmt: skip
def test_batches_lengths_and_spans(
    name: str, batch: int, time: int, read: int, stride: int
) -> None:
    model = randomised(small(PUBLISHED[name]), torch.float32)
    ids, read = sequences(model, batch, time), min(read, time)
    logits = cached(frozen_copy(model), ids, read, time, stride)
    expected = whole(model, ids)[:, max(read, 1) - 1 :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_our_kernels_decode_the_same() -> None:
    model = fused(randomised(small(PUBLISHED["pr1473"]), torch.float32), "cpu")
    ids = sequences(model, 3, TIME)
    frozen = frozen_copy(model, ops=model.ops)
    assert frozen.blocks[0].ops["weight_cast"] == "cpu"  # scales are folded once
    torch.testing.assert_close(
        cached(frozen, ids, 3), whole(model, ids)[:, 2:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_compiled_step_compiles_once_a_span() -> None:
    torch._dynamo.reset()
    model = randomised(small(PUBLISHED["pr1473"], layers=2, ve_layers="0"), torch.float32)
    ids, compiled = sequences(model, 2, TIME), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        compiler = torch.compile
        patch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=backend, **how))
        patch.setattr(decode, "SPANS", 2)
        decoder = Decoder(frozen_copy(model), 2, TIME, compiled=True)
        logits = [decoder.step(ids[:, t]) for t in range(TIME)]
    torch.testing.assert_close(torch.stack(logits, 1), whole(model, ids), rtol=1e-4, atol=1e-4)
    assert len(compiled) == 2


def test_what_is_masked_cannot_come_through() -> None:
    model = randomised(small(PUBLISHED["pr478"]), torch.float64)
    ids = sequences(model, 2, TIME)
    decoder = Decoder(frozen_copy(model), 2, TIME)
    decoder.read(ids)  # what an earlier text left
    decoder.stride = TIME
    decoder.read(ids[:, 2:4])
    expected = whole(model, ids[:, 2:5])[:, -1]
    torch.testing.assert_close(decoder.step(ids[:, 4]), expected, rtol=1e-11, atol=1e-11)


def test_a_full_cache_says_so() -> None:
    model = frozen_copy(randomised(small(PUBLISHED["pr478"]), torch.float32))
    ids = sequences(model, 1, TIME)
    decoder = Decoder(model, 1, 3)
    decoder.read(ids[:, :3])
    assert decoder.full
    with pytest.raises(ConfigError, match="4 tokens do not fit into a cache for 3"):
        decoder.step(ids[:, 3])
    with pytest.raises(ConfigError, match="5 tokens do not fit into a cache for 3"):
        decoder.read(ids[:, :5])
    with pytest.raises(ConfigError, match=f"{TIME + 1} tokens: the model has .* 1 to {TIME}"):
        Decoder(model, 1, TIME + 1)


def test_frozen_copies_cast_once_and_leave_late_qat_out() -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    ids = sequences(model, 2, TIME)
    expected = whole(model, ids)
    switch = torch.ones(())
    for matrix in (m for m in model.modules() if isinstance(m, Matrix)):
        matrix.prepare_qat(4, switch)
    assert not torch.allclose(whole(model, ids), expected, atol=0.1)
    frozen = frozen_copy(model)
    torch.testing.assert_close(whole(frozen, ids), expected)
    assert frozen.tok_emb.weight.data_ptr() == model.tok_emb.weight.data_ptr(), "shared"
    assert not any(p.requires_grad for p in frozen.parameters())

    doubled = {name: p * 2 for name, p in model.export_state().items()}
    assert not torch.allclose(whole(frozen_copy(model, doubled), ids), expected, atol=0.1)
    half = frozen_copy(model, dtype=torch.bfloat16)
    assert half.blocks[0].published.qkv.dtype == half.tok_emb.weight.dtype == torch.bfloat16
    assert half.blocks[0].attn.q_gain.dtype == torch.float32
    torch.testing.assert_close(whole(half, ids), expected, rtol=0.1, atol=1.0)


# --- sampling -------------------------------------------------------------------------------------


def greedy(model: GPT, ids: list[int], count: int, pieces: int) -> list[int]:
    """The most likely continuation, every token from the whole text before it."""
    for _ in range(count):
        ids = [*ids, int(whole(model, torch.tensor([ids]))[0, -1, :pieces].argmax())]
    return ids


@pytest.mark.parametrize("prompt", [1, 3])
def test_greedy_text_is_that_of_whole_passes(prompt: int) -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float64)
    pieces = model.config.vocab_size - 3
    ids = sequences(model, 4, prompt)
    tokens = generate(frozen_copy(model), ids, TIME - prompt, TIME, pieces)
    for row, start in zip(tokens.tolist(), ids.tolist(), strict=True):
        assert row == greedy(model, start, TIME - prompt, pieces)


def test_a_full_context_goes_on_from_its_last_half(monkeypatch) -> None:
    reads, read = [], Decoder.read

    def noted(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
        reads.append(ids.size(1))
        return read(decoder, ids)

    monkeypatch.setattr(Decoder, "read", noted)
    model = randomised(small(PUBLISHED["pr1473"]), torch.float64)
    pieces, ids = model.config.vocab_size, sequences(model, 8, 2)
    tokens = generate(frozen_copy(model), ids, 10, 6, pieces).tolist()
    for row, start in zip(tokens, ids.tolist(), strict=True):
        text = greedy(model, start, 5, pieces)  # 2 + 5: the last was taken from 6
        for _ in range(2):  # each time 3 are kept, and 4 taken before there are 6 again
            text = text[:-3] + greedy(model, text[-3:], 4, pieces)
        assert row == text[:12]
    assert reads == [2, 3, 3]


def test_a_prompt_beyond_the_context_counts_by_its_end() -> None:
    model = randomised(small(PUBLISHED["pr1473"]), torch.float64)
    ids, pieces = sequences(model, 1, 7), model.config.vocab_size
    tokens = generate(frozen_copy(model), ids, 1, 4, pieces)[0].tolist()
    assert tokens == ids[0, :3].tolist() + greedy(model, ids[0, 3:].tolist(), 1, pieces)


def test_pick_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0, -1.0]])
    n = 20_000
    chance = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    taken = pick(logits.expand(n, -1), 0.7, chance)
    expected = torch.softmax(logits[0].double() / 0.7, 0)
    share = torch.bincount(taken, minlength=5).double() / n
    torch.testing.assert_close(share, expected, rtol=0, atol=2 / n)
    assert share[2] == 0
    assert pick(logits, 0.0, chance[:1]).item() == 1
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert pick(logits.expand(2, -1), 1e-3, ends).tolist() == [1, 1]
    assert pick(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), 1.0, ends[:1]).item() == 1
