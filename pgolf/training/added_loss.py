"""What storing a model as it is stored adds to its loss, measured on a little held-out text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.config import Config
from pgolf.data.manifest import Dataset
from pgolf.data.shards import load_validation
from pgolf.model import GPT
from pgolf.model.frozen import frozen_copy
from pgolf.quant.budget import expected_loss
from pgolf.quant.dequantize import dequantize
from pgolf.quant.quantize import QuantizedModel

TOKENS = 16_384  # passed twice: a second for the demo, 20 s for 27 M weights on two cores


@dataclass(frozen=True)
class AddedLoss:
    """Mean losses in nats a token, of the same tokens.

    Attributes:
        before: with the weights as they were.
        after: with those that were stored.
        error: standard error of their difference, taken over sequences; None for a single one.
        tokens: how many were scored, without a sliding window.
        expected: what was expected to be added, by the Hessians; None where that is not known.
    """

    before: float
    after: float
    error: float | None
    tokens: int
    expected: float | None

    def line(self) -> str:
        """All of it, for people."""
        error = "" if self.error is None else f" ± {self.error:.5f}"
        expected = "" if self.expected is None else f"; expected to add {self.expected:.5f}"
        return (
            f"quantisation adds {self.after - self.before:.5f}{error} nats a token: loss "
            f"{self.before:.5f} before, {self.after:.5f} after, measured on {self.tokens:,} "
            f"held-out tokens{expected}"
        )


def added_loss(model: GPT, stored: QuantizedModel, config: Config, dataset: Dataset) -> AddedLoss:
    """Score validation sequences, spread over all of them, with a model's weights and the stored.

    Raises:
        DataError: validation shards are missing or damaged, or hold less than one sequence.
    """
    length = config.data.seq_len
    tokens = load_validation(dataset.folder, config.model.vocab_size, length)
    there = (len(tokens) - 1) // length
    count = min(there, max(TOKENS // length, 1))
    sequences = torch.stack(
        [
            torch.from_numpy(tokens[start : start + length + 1].astype("int64"))
            for start in (length * ((2 * i + 1) * there // (2 * count)) for i in range(count))
        ]
    )
    batch = max(config.eval.eval_tokens // length, 1)
    decoded = {n: dequantize(q).to(model.rope_cos.device) for n, q in stored.tensors.items()}
    before = _losses(model, model.export_state(), sequences, batch)
    after = _losses(model, decoded, sequences, batch)
    error = (after - before).std().item() / math.sqrt(count) if count > 1 else None
    known = any(stats.loss is not None for stats in stored.stats.values())
    expected = expected_loss(stored) if known else None
    return AddedLoss(before.mean().item(), after.mean().item(), error, count * length, expected)


@torch.no_grad()
def _losses(model: GPT, state: Mapping[str, Tensor], sequences: Tensor, batch: int) -> Tensor:
    """Mean loss of each of the sequences (N, T + 1), float64 (N,), with other weights."""
    model = frozen_copy(model, state, ops=model.ops)
    losses = [
        model(ids[:, :-1], ids[:, 1:], last=ids.size(1) - 1).double().mean(dim=1)
        for ids in sequences.to(model.rope_cos.device).split(batch)
    ]
    return torch.cat(losses).cpu()
