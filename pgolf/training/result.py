"""result.json: the score, the sizes and the cost of a run."""

import dataclasses
import json
import lzma
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from pgolf import recipes, roles
from pgolf.data.manifest import Dataset
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import dtype_name
from pgolf.files import atomic_write
from pgolf.quant.budget import Fit
from pgolf.scoring.windows import Sums
from pgolf.training.export import Export
from pgolf.training.phases import limits
from pgolf.training.provenance import provenance
from pgolf.training.session import Session
from pgolf.training.trainer import Trainer

BASELINE_TOKENS = 20_000_000  # a larger text would take xz minutes


def baselines(tokens: np.ndarray, dataset: Dataset) -> dict[str, dict[str, float]]:
    """What general compressors make of the held-out text, in bytes and bits per byte.

    Without zstandard there is no row of it: a trained model must not be lost for that.
    """
    if len(tokens) > BASELINE_TOKENS:
        return {}
    sp = load_tokenizer(dataset.tokenizer_path)
    starts = np.flatnonzero(tokens == sp.bos_id())
    documents = np.split(np.asarray(tokens), starts)
    text = "".join(sp.decode([int(t) for t in d if t != sp.bos_id()]) for d in documents).encode()
    if not text:
        return {}
    sizes = {"xz -9": len(lzma.compress(text, preset=9))}
    with suppress(ImportError):
        import zstandard

        sizes["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(text))
    return {n: {"bytes": size, "bpb": 8 * size / len(text)} for n, size in sizes.items()}


def tensor_rows(packed: Export) -> list[dict[str, Any]]:
    """One row a tensor for result.json."""
    model = packed.model
    return [
        {
            "name": name,
            "group": roles.group(name),
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
    session: Session,
    trainer: Trainer,
    packed: Export,
    decoded: Sums,
    live: Sums | None,
    exported: str,
    idle: Sequence[str],
) -> dict[str, Any]:
    """Assemble and write result.json.

    Args:
        decoded: the score of the artifact.
        live: that of the weights before they were quantised, if it was asked for.
        exported: what the exported weights are, in words.
        idle: what an audit found.
    """
    config, ranks, dataset = session.config, session.ranks, session.dataset
    clock, model = trainer.clock, trainer.model
    dtype = dtype_name(model.compute_dtype)
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
        "phases": session.phases.ledger(
            clock.seconds, limits(config, recipes.get(config.recipe).contest)
        ),
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
        "audit": list(idle),
        "compute_dtype": dtype,
        "scored_by": {"ranks": ranks.world, "device": ranks.device.type, "dtype": dtype},
        "ops": dict(trainer.ops),
        "baselines": baselines(trainer.val, dataset),
        "tensors": tensor_rows(packed),
        "provenance": provenance(ranks.device),
    }
    atomic_write(session.folder.result, json.dumps(result, indent=2) + "\n")
    return result
