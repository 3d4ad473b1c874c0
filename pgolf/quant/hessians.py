"""Statistics of every matrix's inputs, and of how much an error of its outputs matters.

For y = W x the Hessian is H = mean over tokens of x xᵀ (C, C): rounding W to W + E makes a mean
squared error of tr(E H Eᵀ) in y (GPTQ, arXiv 2210.17323). The moment m (R,) is the mean squared
gradient of the summed loss by each output, so that sum_r m_r (E H Eᵀ)_rr estimates what E costs
wherever the matrix stands: the second-order term of the loss with the Fisher matrix in Kronecker
form (K-FAC, arXiv 1503.05671), of which the diagonal is kept on the side of the outputs.

A row of a table is read unchanged, so an error e in it is an error of the value read: with the
gradient g by that value, H is mean(g gᵀ) and m_r the share of |g|² that row r has. A tied token
table is read and is the output matrix too: both costs add up. Their sum is no product of a column
side and a row side; the product nearest to it by the traces is used.

The fused operators hide inputs, so all of this comes from a copy on the reference operators.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pgolf.errors import ConfigError, TrainingError
from pgolf.model import GPT
from pgolf.model.frozen import frozen_copy
from pgolf.progress import Progress
from pgolf.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model's matrices and tables on some text, by name of the parameter.

    Attributes:
        hessians: (C, C) fp32; matrices that read the same inputs (q, k and v) have one tensor.
        moments: (R,) fp32.
        tokens: over how many positions the means were taken.
        held_out: the same on other text, by which results are judged.
    """

    hessians: dict[str, Tensor]
    moments: dict[str, Tensor]
    tokens: int
    held_out: "Calibration | None" = None


class _Watch(TorchFunctionMode):
    """Sums up, over what runs inside, the inputs of matrices and the gradients of outputs.

    Matrices are known by the tensor that a frozen model multiplies by.
    """

    def __init__(self, matrices: Mapping[str, Tensor], tables: Mapping[str, Tensor]):
        super().__init__()
        self.matrices = {id(w): name for name, w in matrices.items()}
        self.tables = {id(w): name for name, w in tables.items()}
        self.inputs = {n: _zeros(w, w.size(1), w.size(1)) for n, w in matrices.items()}
        self.squares = {n: _zeros(w, w.size(0)) for n, w in matrices.items()}
        self.read = {n: _zeros(w, w.size(1), w.size(1)) for n, w in tables.items()}
        self.read_squares = {n: _zeros(w, w.size(0)) for n, w in tables.items()}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.linear and (name := self.matrices.get(id(args[1]))):
            x = _rows(args[0].detach())
            self.inputs[name] += x.T @ x

            def add(gradient: Tensor) -> None:
                self.squares[name] += _squares(gradient).sum(0)

            out.register_hook(add)
        elif function is F.embedding:
            out.requires_grad_()  # the one place where gradients begin: no parameter has one
            if name := self.tables.get(id(args[1])):
                ids = args[0].flatten()

                def add_rows(gradient: Tensor) -> None:
                    g = _rows(gradient)
                    self.read[name] += g.T @ g
                    self.read_squares[name].index_add_(0, ids, _squares(gradient).sum(1))

                out.register_hook(add_rows)
        return out

    def sums(self) -> list[Tensor]:
        """All that is summed up, in an order that every rank has."""
        parts = (self.inputs, self.squares, self.read, self.read_squares)
        return [t for part in parts for t in part.values()]


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def _rows(x: Tensor) -> Tensor:
    """(tokens, width) in fp32; fp64 stays."""
    return x.reshape(-1, x.size(-1)).to(torch.promote_types(x.dtype, torch.float32))


def _squares(gradient: Tensor) -> Tensor:
    return _rows(gradient).double().square()


def collect(
    model: GPT,
    tokens: Tensor,
    batch_tokens: int,
    ranks: Ranks = ALONE,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Calibration:
    """Statistics of a model on sequences, in one forward and backward pass over them.

    Args:
        model: with the weights that will be quantised; late QAT is left out.
        tokens: (N, T + 1) ids, the same on every rank; the last of a row is only a target.
        batch_tokens: tokens a pass, at most, but for a sequence that is longer.
        ranks: each takes as many of the sequences and gets the whole result, which depends on
            their number by rounding only.
        dtype: of activations; products are summed up in fp32 and those sums in fp64.

    Raises:
        ConfigError: there are no tokens.
        TrainingError: an input or gradient is not finite.
    """
    count, time = tokens.size(0), tokens.size(1) - 1
    if count < 1 or time < 1:
        raise ConfigError(
            f"calibration on {tuple(tokens.shape)} tokens: there must be a sequence, of 2 or more"
        )
    own = tokens[ranks.part(count)]
    model = frozen_copy(model, dtype=dtype)
    matrices, tables = _matrices(model), _tables(model)
    with (
        _Watch(matrices, tables) as watch,
        Progress("calibrating", len(own), "sequences", enabled=progress) as bar,
    ):
        # With more ranks than sequences, some have none.
        batches = own.to(model.rope_cos.device).split(max(batch_tokens // time, 1))
        for batch in batches if len(own) else ():
            inputs, targets = batch[:, :-1], batch[:, 1:]
            (model(inputs, targets) * targets.numel()).backward()
            bar.update(len(batch))
    if ranks.world > 1:
        for t in watch.sums():
            dist.all_reduce(t)
    return _calibration(model, watch, count * time)


def _matrices(model: GPT) -> dict[str, Tensor]:
    """Name -> weight as a frozen model multiplies by it; q, k and v are one."""
    names, matrices = ("attn.c_q", "attn.proj", "mlp.fc", "mlp.proj"), {}
    for i, block in enumerate(model.blocks):
        for name, weight in zip(names, block.published[: len(names)], strict=True):
            matrices[f"blocks.{i}.{name}.weight"] = weight
    for name in ("bigram", "ve_shared"):
        side = getattr(model, name, None)
        if side is not None and side.proj is not None:
            matrices[f"{name}.proj.weight"] = side.proj.weight
    head = "tok_emb" if model.lm_head is None else "lm_head"
    return matrices | {f"{head}.weight": model.head_weight}


def _tables(model: GPT) -> dict[str, Tensor]:
    """Name -> table that is read by rows."""
    tables = {"tok_emb.weight": model.tok_emb.weight}
    for name in ("bigram", "ve_shared"):
        side = getattr(model, name, None)
        if side is not None:
            tables[f"{name}.embed.weight"] = side.embed.weight
    return tables


def _calibration(model: GPT, watch: _Watch, tokens: int) -> Calibration:
    """Sums to means, by name of the parameter.

    Raises:
        TrainingError: one of them is not finite.
    """
    hessians = {n: s / tokens for n, s in watch.inputs.items()}
    moments = {n: s / tokens for n, s in watch.squares.items()}
    for name, read in watch.read.items():
        hessian, rows = read / tokens, watch.read_squares[name] / tokens
        if name in hessians:
            rows = rows + moments[name] * hessians[name].trace()
            hessian = hessian + moments[name].sum() * hessians[name]
        hessians[name], moments[name] = hessian, rows / hessian.trace().clamp(min=1e-30)
    hessians = {n: h.float() for n, h in hessians.items()}
    for i, block in enumerate(model.blocks):
        prefix = f"blocks.{i}.attn.c_"
        sizes = [m.weight.size(0) for m in block.attn.matrices()[:3]]
        for c, rows in zip("qkv", moments[f"{prefix}q.weight"].split(sizes), strict=True):
            hessians[f"{prefix}{c}.weight"] = hessians[f"{prefix}q.weight"]
            moments[f"{prefix}{c}.weight"] = rows
    for name, hessian in hessians.items():
        if not (hessian.isfinite().all() and moments[name].isfinite().all()):
            raise TrainingError(
                f"inputs or gradients of {name} are not finite on the calibration text: the "
                "training diverged, quantise an earlier checkpoint"
            )
    return Calibration(hessians, {n: m.float() for n, m in moments.items()}, tokens)
