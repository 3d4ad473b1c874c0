"""From trained weights to a written artifact: calibrate, quantise, fit the budget, pack."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact.pack import PackReport, encode, write_artifact, write_encoded
from pgolf.config import Config
from pgolf.data.manifest import Dataset
from pgolf.errors import BudgetError
from pgolf.model import GPT
from pgolf.quant.budget import Fit, Steps, fill_budget, fit_lines
from pgolf.quant.calibration import calibration_tokens
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import Calibration, collect
from pgolf.quant.prune import prune_to_fit
from pgolf.quant.quantize import QuantizedModel, quantize, relative_error
from pgolf.training.added_loss import AddedLoss, added_loss
from pgolf.training.session import Script, Session

CALIBRATION_TOKENS = 16_384  # a pass at most: forward and backward in fp32 keep much


@dataclasses.dataclass
class Export:
    """A written artifact, what it weighs and what it cost.

    Attributes:
        model: what was stored.
        report: bytes of the file.
        script: the submission's code, whose size counts.
        pruned: codes that were zeroed to fit.
        fit: how the budget was filled, if it was.
        added: what it costs in loss.
        seconds: for calibration and quantisation.
    """

    model: QuantizedModel
    report: PackReport
    script: Script
    pruned: int
    fit: Fit | None
    added: AddedLoss | None
    seconds: float

    @property
    def bytes_code(self) -> int:
        return len(self.script.data)

    @property
    def total(self) -> int:
        """Bytes of model and code."""
        return self.report.total + self.bytes_code


def metadata(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What an artifact says of itself: all that scoring needs, and where it comes from."""
    return {
        "model": dataclasses.asdict(config.model),
        "seq_len": config.data.seq_len,
        "recipe": config.recipe,
        "seed": config.run.seed,
        "corpus": dataset.corpus,
        "tokenizer_sha256": dataset.tokenizer_sha256,
    }


def calibrate(session: Session, model: GPT) -> Calibration | None:
    """Hessians and moments of a model's matrices, on all ranks; None if nothing asks for them."""
    config, ranks, dataset = session.config, session.ranks, session.dataset
    if config.quant.quantizer != "gptq":
        return None
    texts = calibration_tokens(
        config, model, dataset.train_shards, dataset.vocab_size, ranks, ranks.first
    )
    batch = min(config.eval.eval_tokens, CALIBRATION_TOKENS)
    own, held_out = (collect(model, text, batch, ranks, progress=ranks.first) for text in texts)
    return dataclasses.replace(own, held_out=held_out)


def export(session: Session, model: GPT, script: Script | None, path: Path) -> Export | None:
    """Quantise the weights of `model` and write them to `path`, within the budget.

    All ranks take part; the first writes and gets the report, the others get None.

    Args:
        script: the code that counts with the model; the first rank's is looked at.

    Raises:
        BudgetError: code + model exceed the budget and nothing that is allowed makes them fit; what
            stood at `path` is left as it was.
        ConfigError: the budget is to be fitted, and there is no matrix whose step could change.
    """
    config, dataset = session.config, session.dataset
    meta, state = metadata(config, dataset), model.export_state()
    started = time.perf_counter()
    # Products with rounded inputs would be TF32 on a GPU as they are in training.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with session.phases("quantisation"):
            quantized, fit = _quantized(session, model, state, meta, script)
    finally:
        torch.set_float32_matmul_precision(precision)
    seconds = time.perf_counter() - started

    def write() -> Export:
        if line := rounded_line(quantized):
            session.say(line)
        packed, report, pruned = _pack(quantized, state, meta, config, len(script.data), path)
        # A run whose shards are gone can still be packed again.
        added = added_loss(model, packed, config, dataset) if dataset.train_shards else None
        if added is not None:
            session.say(added.line())
        return Export(packed, report, script, pruned, fit, added, seconds)

    with session.phases("packing"):
        return session.ranks.on_first(write)


def rounded_line(model: QuantizedModel) -> str:
    """Which matrices are not GPTQ's because it was worse, for people; empty if it never was."""
    names = [name for name, stats in model.stats.items() if stats.rounded]
    if not names:
        return ""
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} of {sum(q.steps is not None for q in model.tensors.values())} matrices are "
        f"rounded to nearest ({listed}): GPTQ was worse on held-out text at the same bits; raise "
        "calibration_sequences or damping"
    )


def _quantized(
    session: Session,
    model: GPT,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    script: Script | None,
) -> tuple[QuantizedModel, Fit | None]:
    """The quantised model, and how it was fitted if it was."""
    config, ranks = session.config, session.ranks
    with session.phases("calibration"):
        statistics = calibrate(session, model)
    if statistics is None:
        return quantize(state, config.quant, ranks.first, ranks=ranks), None
    factors = Factors(statistics.hessians, config.quant.damping)
    if config.quant.grid == "uniform":
        steps = Steps(state, config.quant, statistics, factors, ranks)
        if config.artifact.fit_to_budget:
            return _fitted(session, steps, meta, script)
        if steps.names:
            return steps.at(steps.level.at(steps.nominal), ranks.first), None
    return quantize(
        state, config.quant, ranks.first, factors, statistics.moments, ranks=ranks,
        held_out=statistics.held_out,
    ), None  # fmt: skip


def _fitted(
    session: Session, steps: Steps, meta: Mapping[str, Any], script: Script | None
) -> tuple[QuantizedModel, Fit]:
    """The model that fills what the script leaves of the budget; the first rank has the script."""
    config, ranks = session.config, session.ranks
    budget = config.artifact.budget_bytes - len(script.data) if ranks.first else 0
    budget = int(ranks.decide(budget)[0])
    probing = dataclasses.replace(config.artifact, codec=_probing(config.artifact.codec))

    def size(candidate: QuantizedModel) -> int:
        """Bytes of the file, on every rank."""
        data = ranks.on_first(lambda: encode(candidate, meta, probing, progress=False).data)
        return int(ranks.decide(len(data or b""))[0])

    quantized, fit = fill_budget(steps, budget, size, ranks.first)
    for line in fit_lines(fit, budget):
        session.say(line)
    return quantized, fit


def _probing(codec: str) -> str:
    """The codec that sizes are measured with while a budget is fitted."""
    return "rans" if codec == "auto" else codec


def _pack(
    model: QuantizedModel,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    config: Config,
    bytes_code: int,
    path: Path,
) -> tuple[QuantizedModel, PackReport, int]:
    """Write the file; prune if code + model exceed the budget. The model, the report, the count.

    Raises:
        BudgetError: they exceed it still, or pruning is off.
    """
    encoded = encode(model, meta, config.artifact)
    limit, total = config.artifact.budget_bytes, len(encoded.data) + bytes_code
    if not limit or total <= limit:
        return model, write_encoded(path, model, encoded), 0
    over = (
        f"model {len(encoded.data):,} + code {bytes_code:,} = {total:,} bytes, "
        f"{total - limit:,} over the limit of {limit:,}"
    )
    if not config.artifact.prune_to_fit:
        raise BudgetError(
            f"{over}: use grid=uniform fit_to_budget=true, fewer bits, or a smaller model",
            total - limit,
        )
    print(f"{over}: pruning", flush=True)
    fixed = dataclasses.replace(config.artifact, codec=encoded.codec, packing=encoded.packing)
    # zstd never writes more at a higher level, so quick probes only err on the safe side.
    quick = dataclasses.replace(fixed, zstd_level=1)

    def size(candidate: QuantizedModel) -> int:
        return len(encode(candidate, meta, quick, progress=False).data)

    model, pruned = prune_to_fit(model, size, limit - bytes_code)
    report = write_artifact(path, model, meta, fixed)
    stats = {
        name: dataclasses.replace(
            s,
            relative_error=relative_error(state[name], model.tensors[name]),
            hessian_error=None,
            loss=None,
        )
        for name, s in model.stats.items()
    }
    return dataclasses.replace(model, stats=stats), report, pruned
