"""Ask fresh processes for the score of an artifact, and `pgolf eval`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pgolf import errors
from pgolf.artifact.foreign import refuse_foreign
from pgolf.config import from_dict, parse_overrides
from pgolf.data.manifest import Dataset
from pgolf.device import pick_device, pick_dtype
from pgolf.errors import PgolfError
from pgolf.evaluate import Sums
from pgolf.model.gpt import DTYPES
from pgolf.train.run_folder import read_config


def ask(**job: Any) -> dict[str, Any]:
    """Run `python -m pgolf.score` with this job and return what it says.

    Raises:
        PgolfError: what the process reports, or that it died.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pgolf.score", json.dumps(job)], stdout=subprocess.PIPE, text=True
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise PgolfError(f"the scoring process ended with exit code {done.returncode}; see above")
    result = json.loads(lines[-1])
    if "error" in result:
        raise getattr(errors, result["kind"], PgolfError)(result["error"])
    return result


def sums_of(result: dict[str, Any]) -> Sums:
    return Sums(result["nll"], result["targets"], result["bytes"])


def main(argv: list[str]) -> int:
    """`pgolf eval`."""
    parser = argparse.ArgumentParser(
        prog="pgolf eval",
        description="Score an artifact in bits per byte, in a fresh process that loads only the "
        "artifact and the validation shards.",
        epilog="examples: pgolf eval runs/demo-seed1337/artifact --stride 256; "
        "pgolf eval small data=data/mine",
    )
    parser.add_argument("artifact", type=Path, help="artifact file of a run")
    parser.add_argument(
        "words", nargs="*", metavar="data=FOLDER", help="the same as --data FOLDER"
    )
    parser.add_argument("--data", type=Path, help="folder of shards; default: the run's")
    parser.add_argument("--tokenizer", type=Path, help="default: the one of the shards")
    parser.add_argument("--stride", type=int, default=64, help="targets a window scores (64)")
    parser.add_argument("--val-tokens", type=int, default=0, help="first N tokens only; 0 = all")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    args = parser.parse_intermixed_args(argv)

    for key, value in parse_overrides(args.words).items():
        if key != "data" or args.data:
            raise errors.ConfigError(f"{key}={value}: scoring takes one data=FOLDER and options")
        args.data = Path(value)
    if not args.artifact.is_file():
        raise errors.ArtifactError(f"{args.artifact}: no such file; it is called artifact in a run")
    refuse_foreign(args.artifact)
    run = args.artifact.parent
    if not args.data and not (run / "config.json").is_file():
        raise errors.ConfigError(
            f"{args.artifact}: no config.json beside it that names shards to score: use data=FOLDER"
        )
    folder, tokenizer = args.data, args.tokenizer
    if not folder:
        trained_on = from_dict(read_config(run)).data
        folder, tokenizer = trained_on.data, tokenizer or trained_on.tokenizer
    if args.stride < 1 or args.val_tokens < 0:
        raise errors.ConfigError("--stride must be at least 1 and --val-tokens at least 0")
    dataset = Dataset.open(folder, tokenizer)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)[0]
    result = ask(
        artifact=str(args.artifact),
        device=str(device),
        dtype=next(name for name, d in DTYPES.items() if d == dtype),
        data=str(folder),
        tokenizer=str(dataset.tokenizer_path),
        tokenizer_sha256=dataset.tokenizer_sha256,
        stride=args.stride,
        val_tokens=args.val_tokens,
        eval_tokens=16_384 if device.type == "cpu" else 262_144,
        part=[0, 1],
        compile=device.type == "cuda",
        progress="scoring",
    )
    meta, sums = result["meta"], sums_of(result)
    print(
        f"val_bpb {sums.bpb:.6f}  val_loss {sums.loss:.6f} nats/token  stride {args.stride}  "
        f"{sums.targets:,} targets  {sums.bytes:,} bytes  corpus {dataset.corpus}  "
        f"{result['seconds']:.1f} s"
    )
    if dataset.corpus != meta["corpus"]:
        print(f"trained on {meta['corpus']}: BPB of different corpora is not comparable")
    return 0
