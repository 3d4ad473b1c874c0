"""From trained weights to a written artifact: calibrate, quantise, fit the budget, pack."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf.artifact.pack import PackReport, encode, write_artifact
from pgolf.config import Config
from pgolf.data.manifest import Dataset
from pgolf.errors import BudgetError
from pgolf.model import GPT
from pgolf.progress import format_seconds
from pgolf.quant.budget import Steps, fill_budget, fit_lines
from pgolf.quant.calibration import calibration_tokens
from pgolf.quant.fit import Fit
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import Calibration, collect
from pgolf.quant.prune import prune_to_fit
from pgolf.quant.quantize import QuantizedModel, quantize, relative_error
from pgolf.submission.script import Script, build_script
from pgolf.train.ranks import Ranks


@dataclasses.dataclass
class Export:
    """A written artifact, what it weighs and what it cost.

    Attributes:
        model: what was stored.
        report: bytes of the file.
        script: the submission's code, whose size counts.
        pruned: codes that were zeroed to fit.
        fit: how the budget was filled, if it was.
        seconds: for calibration and quantisation.
    """

    model: QuantizedModel
    report: PackReport
    script: Script
    pruned: int
    fit: Fit | None
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


def calibrate(model: GPT, config: Config, dataset: Dataset, ranks: Ranks) -> Calibration | None:
    """Hessians and moments of a model's matrices, on all ranks; None if nothing asks for them."""
    if config.quant.quantizer != "gptq":
        return None
    part = (ranks.rank, ranks.world)
    tokens = calibration_tokens(
        config, model, dataset.train_shards, dataset.vocab_size, part, ranks.first
    )
    return collect(model, tokens, config.eval.eval_tokens, part, progress=ranks.first)


def export(
    model: GPT,
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    path: Path,
    say: Callable[[str], None],
) -> Export | None:
    """Quantise the weights of `model` and write them to `path`, within the budget.

    All ranks take part; the first writes and gets the report, the others get None.

    Raises:
        BudgetError: code + model exceed the budget and nothing that is allowed makes them fit; no
            file is left.
    """
    started = time.perf_counter()
    meta, state = metadata(config, dataset), model.export_state()
    statistics = calibrate(model, config, dataset, ranks)
    factors = Factors(statistics.hessians, config.quant.damping) if statistics else None
    script = ranks.on_first(lambda: build_script(config))
    share, found = (ranks.rank, ranks.world), None
    if statistics and config.quant.grid == "uniform":
        steps = Steps(state, config.quant, statistics, factors, share)
        if config.artifact.fit_to_budget:
            quantized, found = _fitted(steps, meta, config, script, ranks, say)
        else:
            quantized = steps.at(steps.dial.at(steps.nominal), ranks.first)
    else:
        moments = statistics.moments if statistics else None
        quantized = quantize(state, config.quant, ranks.first, factors, moments, share=share)
    seconds = time.perf_counter() - started
    if 0 < config.schedule.reserve_s < seconds:
        say(
            f"calibration and quantisation took {format_seconds(seconds)}: raise reserve_s="
            f"{config.schedule.reserve_s:g} for them to be within max_seconds"
        )

    def write() -> Export:
        try:
            packed, report, pruned = _pack(quantized, state, meta, config, len(script.data), path)
        except BudgetError:
            path.unlink(missing_ok=True)
            raise
        return Export(packed, report, script, pruned, found, seconds)

    return ranks.on_first(write)


def _fitted(
    steps: Steps,
    meta: Mapping[str, Any],
    config: Config,
    script: Script | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> tuple[QuantizedModel, Fit]:
    """The model that fills what the script leaves of the budget; the first rank has the script."""
    room = config.artifact.budget_bytes - len(script.data) if ranks.first else 0
    room = int(ranks.decide(room)[0])
    probing = dataclasses.replace(config.artifact, codec=_probing(config.artifact.codec))

    def size(candidate: QuantizedModel) -> int:
        """Bytes of the file, on every rank."""
        data = encode(candidate, meta, probing, progress=False).data if ranks.first else b""
        return int(ranks.decide(len(data))[0])

    quantized, found = fill_budget(steps, room, size, ranks.first)
    for line in fit_lines(found, room):
        say(line)
    return quantized, found


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
    report = write_artifact(path, model, meta, config.artifact)
    limit, total = config.artifact.budget_bytes, report.total + bytes_code
    if not limit or total <= limit:
        return model, report, 0
    over = (
        f"model {report.total:,} + code {bytes_code:,} = {total:,} bytes, "
        f"{total - limit:,} over the limit of {limit:,}"
    )
    if not config.artifact.prune_to_fit:
        raise BudgetError(
            f"{over}: use grid=uniform fit_to_budget=true, fewer bits, or a smaller model"
        )
    print(f"{over}: pruning", flush=True)
    fixed = dataclasses.replace(config.artifact, codec=report.codec, packing=report.packing)
    # The codec never writes more at a higher level, so quick probes only err on the safe side.
    quick = dataclasses.replace(fixed, zstd_level=1)

    def size(candidate: QuantizedModel) -> int:
        return len(encode(candidate, meta, quick, progress=False).data)

    model, pruned = prune_to_fit(model, size, limit - bytes_code)
    report = write_artifact(path, model, meta, fixed)
    stats = {
        name: dataclasses.replace(
            s, relative_error=relative_error(state[name], model.tensors[name])
        )
        for name, s in model.stats.items()
    }
    return dataclasses.replace(model, stats=stats), report, pruned
