"""After the export: decode and score the file in fresh processes, and report."""

import dataclasses
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from pgolf.config import Config
from pgolf.data.manifest import Dataset
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import dtype_name
from pgolf.evaluate import Sums
from pgolf.files import atomic_write
from pgolf.optim.schedule import Clock
from pgolf.quant.budget import Fit
from pgolf.quant.plan import category
from pgolf.train.export import Export
from pgolf.train.provenance import provenance
from pgolf.train.ranks import Ranks
from pgolf.train.scoring import ask, sums_of

BASELINE_TOKENS = 20_000_000  # a larger text would take xz minutes


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


def tensor_rows(packed: Export) -> list[dict[str, Any]]:
    """One row a tensor for result.json."""
    model = packed.model
    return [
        {
            "name": name,
            "group": category(name),
            "kind": model.plans[name].kind,
            "bits": q.bits,
            "shape": list(q.shape),
            "bytes": packed.report.tensors[name],
            **dataclasses.asdict(model.stats[name]),
        }
        for name, q in model.tensors.items()
    ]


def fit_row(fit: Fit | None) -> dict[str, Any] | None:
    """How the budget was filled, for result.json; None where it was not."""
    if fit is None:
        return None
    beside = {"chosen": fit.chosen, "coarser": fit.coarser, "finer": fit.finer}
    return {
        "probes": fit.probes,
        "full": fit.full,
        **{k: p and {"bytes_model": p.size, "expected_loss": p.loss} for k, p in beside.items()},
    }


def write_result(
    path: Path,
    config: Config,
    dataset: Dataset,
    packed: Export,
    clock: Clock,
    decoded: Sums,
    live: Sums | None,
    exported: str,
    tokens: np.ndarray,
    ranks: Ranks,
    dtype: torch.dtype,
    attention: str,
    ops: Mapping[str, str],
) -> dict[str, Any]:
    """Assemble and write result.json."""
    name = dtype_name(dtype)
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
        "budget_fit": fit_row(packed.fit),
        "quantisation_loss": packed.added and dataclasses.asdict(packed.added),
        "quantise_seconds": packed.seconds,
        "code_modules": sorted(packed.script.sources),
        "steps": clock.step,
        "tokens": clock.tokens,
        "train_seconds": clock.seconds,
        "ms_per_step": 1000 * clock.seconds / max(clock.step, 1),
        "tokens_per_second": clock.tokens / clock.seconds if clock.seconds else None,
        "parameters": sum(q.data.numel() for q in packed.model.tensors.values()),
        "recipe": config.recipe,
        "as_published": config.as_published,
        "seed": config.run.seed,
        "corpus": dataset.corpus,
        "corpus_sha256": dataset.sha256,
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "seq_len": config.data.seq_len,
        "stride": config.eval.stride,
        "val_targets": decoded.targets,
        "val_bytes": decoded.bytes,
        "exported_weights": exported,
        "compute_dtype": name,
        "scored_by": {"ranks": ranks.world, "device": ranks.device.type, "dtype": name},
        "attention": attention,
        "ops": dict(ops),
        "baselines": baselines(tokens, dataset),
        "tensors": tensor_rows(packed),
        "provenance": provenance(ranks.device),
    }
    atomic_write(path, json.dumps(result, indent=2) + "\n")
    return result
