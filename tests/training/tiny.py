"""A model with every technique, for runs that take seconds; its corpus is bench.synthetic's."""

import json
import os
from pathlib import Path

# Sums are split over threads: one thread, so that two runs round alike.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[2]

# A model that trains in milliseconds and has every technique.
TINY = [
    "vocab_size=400", "layers=3", "dim=64", "heads=4", "kv_heads=2", "mlp_hidden=96",
    "rope_dims=8", "bigram_buckets=64", "bigram_dim=32", "ve_dim=32", "seq_len=32",
    "batch_tokens=256", "micro_tokens=128", "max_tokens=5120", "max_steps=20", "val_every=10",
    "val_tokens=640", "stride=8", "log_every=1", "checkpoint_every=5", "compute_dtype=fp32",
    "qat_start=0.7", "ema_start=0.5", "small_numel=0", "codec=zstd", "zstd_level=3",
]  # fmt: skip


def replaced(defaults: list[str], words: tuple[str, ...]) -> list[str]:
    """Words without the defaults that they replace."""
    given = {w.split("=")[0] for w in words}
    return [d for d in defaults if d.split("=")[0] not in given] + list(words)


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = "seconds", "ms_per_step", "tokens_per_second", "wait_ms"
    return [{k: v for k, v in m.items() if k not in timed} for m in lines]
