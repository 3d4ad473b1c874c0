"""After training: quantise, pack to the budget, decode and score in fresh processes, report."""

import dataclasses
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from pgolf.artifact.code_size import code_bytes
from pgolf.artifact.pack import PackReport, encode, write_artifact
from pgolf.config import Config
from pgolf.data.manifest import Dataset
from pgolf.data.tokenizer import load_tokenizer
from pgolf.errors import BudgetError
from pgolf.evaluate import Sums
from pgolf.files import atomic_write
from pgolf.model.gpt import DTYPES
from pgolf.optim.schedule import Clock
from pgolf.quant.policy import category
from pgolf.quant.prune import prune_to_fit
from pgolf.quant.quantize import QuantizedModel, quantize, relative_error
from pgolf.train.provenance import provenance
from pgolf.train.ranks import Ranks
from pgolf.train.scoring import ask, code_files, relative, sums_of

BASELINE_TOKENS = 20_000_000  # a larger text would take xz minutes


@dataclasses.dataclass
class Packed:
    """A written artifact and what it weighs."""

    model: QuantizedModel
    report: PackReport
    code: list[Path]
    bytes_code: int
    pruned: int

    @property
    def total(self) -> int:
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


def pack_to_budget(
    state: dict[str, torch.Tensor], config: Config, dataset: Dataset, path: Path
) -> Packed:
    """Quantise and write; prune if code + model exceed the budget.

    Raises:
        BudgetError: they exceed it still, or pruning is off; no file is left.
    """
    try:
        return _packed(state, config, dataset, path)
    except BudgetError:
        path.unlink(missing_ok=True)
        raise


def _packed(
    state: dict[str, torch.Tensor], config: Config, dataset: Dataset, path: Path
) -> Packed:
    meta = metadata(config, dataset)
    model = quantize(state, config.quant)
    report = write_artifact(path, model, meta, config.artifact)
    answer = ask(artifact=str(path), device="cpu", dtype="fp32")
    code = code_files(answer)
    packed = Packed(model, report, code, code_bytes(code), 0)
    limit = config.artifact.budget_bytes
    if not limit or packed.total <= limit:
        return packed
    over = (
        f"model {report.total:,} + code {packed.bytes_code:,} = {packed.total:,} bytes, "
        f"{packed.total - limit:,} over the limit of {limit:,}"
    )
    if not config.artifact.prune_to_fit:
        raise BudgetError(f"{over}: use prune_to_fit=true, fewer bits, or a smaller model")
    print(f"{over}: pruning", flush=True)
    fixed = dataclasses.replace(config.artifact, codec=report.codec, packing=report.packing)
    # The codec never writes more at a higher level, so quick probes only err on the safe side.
    quick = dataclasses.replace(fixed, zstd_level=1)

    def size(candidate: QuantizedModel) -> int:
        return len(encode(candidate, meta, quick, progress=False).data)

    model, pruned = prune_to_fit(model, size, limit - packed.bytes_code)
    report = write_artifact(path, model, meta, fixed)
    stats = {
        name: dataclasses.replace(
            s, relative_error=relative_error(state[name], model.tensors[name])
        )
        for name, s in model.stats.items()
    }
    model = dataclasses.replace(model, stats=stats)
    return dataclasses.replace(packed, model=model, report=report, pruned=pruned)


def score_artifact(path: Path, config: Config, dataset: Dataset, ranks: Ranks, dtype: str) -> Sums:
    """Score the file in fresh processes, one a rank, each with its part of the windows."""
    answer = ask(
        artifact=str(path),
        device=str(ranks.device),
        dtype=dtype,
        data=str(dataset.folder),
        tokenizer=str(dataset.tokenizer_path),
        tokenizer_sha256=dataset.tokenizer_sha256,
        stride=config.eval.stride,
        val_tokens=config.eval.val_tokens,
        eval_tokens=config.eval.eval_tokens,
        part=[ranks.rank, ranks.world],
        compile=ranks.device.type == "cuda",
        progress="scoring decoded" if ranks.first else "",
    )
    part = sums_of(answer)
    nll, targets, size = ranks.sum([part.nll, part.targets, part.bytes])
    return Sums(nll, int(targets), int(size))


def baselines(tokens: np.ndarray, dataset: Dataset) -> dict[str, dict[str, float]]:
    """What general compressors make of the held-out text, in bytes and bits per byte."""
    if len(tokens) > BASELINE_TOKENS:
        return {}
    sp = load_tokenizer(dataset.tokenizer_path)
    starts = np.flatnonzero(tokens == sp.bos_id())
    documents = np.split(np.asarray(tokens), starts)
    text = "".join(sp.decode([int(t) for t in d if t != sp.bos_id()]) for d in documents).encode()
    if not text:
        return {}
    sizes = {
        "xz -9": len(lzma.compress(text, preset=9)),
        "zstd -19": len(zstandard.ZstdCompressor(level=19).compress(text)),
    }
    return {n: {"bytes": size, "bpb": 8 * size / len(text)} for n, size in sizes.items()}


def tensor_rows(model: QuantizedModel) -> list[dict[str, Any]]:
    """One row a tensor for result.json."""
    return [
        {
            "name": name,
            "group": category(name),
            "kind": model.plans[name].kind,
            "bits": q.bits,
            "shape": list(q.shape),
            "relative_error": model.stats[name].relative_error,
            "floor_share": model.stats[name].floor_share,
        }
        for name, q in model.tensors.items()
    ]


def write_result(
    path: Path,
    config: Config,
    dataset: Dataset,
    packed: Packed,
    clock: Clock,
    decoded: Sums,
    live: Sums | None,
    exported: str,
    tokens: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    ops: Mapping[str, str],
) -> dict[str, Any]:
    """Assemble and write result.json."""
    result = {
        "val_bpb": decoded.bpb,
        "val_bpb_live": live.bpb if live else None,
        "val_loss": decoded.loss,
        "bytes_model": packed.report.total,
        "bytes_code": packed.bytes_code,
        "bytes_total": packed.total,
        "budget_bytes": config.artifact.budget_bytes,
        "bytes_by_group": packed.report.groups,
        "codecs_tried": packed.report.tried,
        "codes_pruned": packed.pruned,
        "code_files": relative(packed.code),
        "steps": clock.step,
        "tokens": clock.tokens,
        "train_seconds": clock.seconds,
        "ms_per_step": 1000 * clock.seconds / max(clock.step, 1),
        "tokens_per_second": clock.tokens / clock.seconds if clock.seconds else None,
        "parameters": sum(q.data.numel() for q in packed.model.tensors.values()),
        "recipe": config.recipe,
        "seed_exact": config.seed_exact,
        "seed": config.run.seed,
        "corpus": dataset.corpus,
        "corpus_sha256": dataset.sha256,
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "seq_len": config.data.seq_len,
        "stride": config.eval.stride,
        "val_targets": decoded.targets,
        "val_bytes": decoded.bytes,
        "exported_weights": exported,
        "compute_dtype": next(n for n, d in DTYPES.items() if d == dtype),
        "attention": attention,
        "ops": dict(ops),
        "baselines": baselines(tokens, dataset),
        "tensors": tensor_rows(packed.model),
        "provenance": provenance(device),
    }
    atomic_write(path, json.dumps(result, indent=2) + "\n")
    return result
