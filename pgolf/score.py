"""Score an artifact in a process that has seen nothing else; `train.scoring.ask` starts it.

It loads the artifact, the validation shards and the tokenizer (for byte counts alone), and prints
one JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pgolf.artifact.load import load_model
from pgolf.bpb import ByteTable, refuse_if_foreign
from pgolf.data.shards import load_validation
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import DTYPES
from pgolf.errors import DataError, PgolfError
from pgolf.evaluate import evaluate


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Score one rank's part of the windows.

    Args:
        job: artifact, device, dtype; data (folder), tokenizer and its tokenizer_sha256, stride,
            val_tokens (0 = all), eval_tokens, part [rank, world], compile, progress.
    """
    model, meta = load_model(job["artifact"], torch.device(job["device"]), DTYPES[job["dtype"]])
    if job["tokenizer_sha256"] != meta["tokenizer_sha256"]:
        raise DataError(
            f"{job['tokenizer']} is not the tokenizer of {job['artifact']}: its sha256 differs "
            "from the one that the artifact names"
        )
    length = meta["seq_len"]
    sp = load_tokenizer(job["tokenizer"])
    size = min(sp.get_piece_size(), model.config.vocab_size)
    tokens = load_validation(Path(job["data"]), size, length, job["val_tokens"])
    refuse_if_foreign(sp, tokens, job["tokenizer"], job["data"])
    table = ByteTable(sp, model.config.vocab_size)
    forward = torch.compile(model, dynamic=False) if job["compile"] else model
    started = time.perf_counter()
    sums = evaluate(
        forward,
        tokens,
        table,
        length,
        job["stride"],
        job["eval_tokens"],
        tuple(job["part"]),
        job["progress"],
    )
    return {
        "meta": meta,
        "nll": sums.nll,
        "targets": sums.targets,
        "bytes": sums.bytes,
        "seconds": time.perf_counter() - started,
    }


def main() -> int:
    """Read the job, JSON on the command line, print the result as the last line."""
    try:
        result = score(json.loads(sys.argv[1]))
    except PgolfError as e:
        result = {"error": str(e), "kind": type(e).__name__}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
