"""A small run folder whose numbers are easy to check by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgolf.config import Config, to_dict


@pytest.fixture
def result() -> dict[str, Any]:
    """result.json of a run of 20 steps."""
    tensors = [
        {"name": f"blocks.{layer}.{part}.weight", "group": part.split(".")[0], "kind": "int",
         "bits": 6, "shape": [64, 32], "relative_error": 0.02 + 0.01 * layer, "floor_share": 0.25}
        for layer in (0, 1)
        for part in ("attn.c_q", "attn.proj", "mlp.fc")
    ]
    tensors += [
        {"name": "tok_emb.weight", "group": "tok", "kind": "int", "bits": 8, "shape": [1024, 32],
         "relative_error": 0.007, "floor_share": 0.0},
        {"name": "bigram.scale", "group": "scalars", "kind": "float16", "bits": 16, "shape": [],
         "relative_error": 0.0001, "floor_share": 0.0},
    ]
    return {
        "val_bpb": 2.02, "val_bpb_live": 2.0, "val_loss": 3.4,
        "bytes_model": 900, "bytes_code": 100, "bytes_total": 1000, "budget_bytes": 4000,
        "bytes_by_group": {"attn": 500, "mlp": 300, "tok": 80, "meta": 20},
        "code_modules": ["pgolf/score.py"], "steps": 20, "tokens": 81920, "ms_per_step": 640.25,
        "train_seconds": 75.0, "tokens_per_second": 1092.27, "parameters": 123456,
        "recipe": "demo", "corpus": "wikipedia-leads-en", "corpus_sha256": "9f" * 32,
        "tokenizer_sha256": "ab" * 32, "seed": 1337, "stride": 64, "seq_len": 256,
        "val_targets": 4321, "val_bytes": 9876, "exported_weights": "EMA",
        "baselines": {"xz -9": {"bytes": 3738, "bpb": 3.03},
                      "zstd -19": {"bytes": 4000, "bpb": 3.2}},
        "tensors": tensors,
        "provenance": {"commit": "0123abcd" * 5, "torch": "2.9.1", "driver": None,
                       "cpu_flags": ["avx2", "avx512f"]},
    }


@pytest.fixture
def metrics() -> list[dict[str, Any]]:
    """metrics.jsonl of that run, line by line."""
    lines: list[dict[str, Any]] = []
    for step in range(1, 21):
        at = {"step": step, "tokens": 4096 * step, "seconds": 0.64 * step}
        lines.append({"kind": "train", **at, "loss": 7 - 0.175 * step, "lr_scale": 1 - step / 20,
                      "momentum": 0.85, "grad_norm": 0.5, "ms_per_step": 640.0})
        if step % 10 == 0:
            lines.append({"kind": "val", **at, "loss": 7.1 - 0.175 * step, "bpb": 4.1 - 0.1 * step})
        if step == 18:
            lines.append({"kind": "event", **at, "text": "late QAT on"})
    return lines


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run folder; NaN is written as Python's json writes it."""

    def write(result: dict[str, Any], metrics: list[dict[str, Any]]) -> Path:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps(to_dict(Config(recipe="demo"))))
        (run / "result.json").write_text(json.dumps(result))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        return run

    return write
