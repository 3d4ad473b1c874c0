"""`pgolf eval`: score an artifact in a fresh process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgolf.artifact.location import artifact_of
from pgolf.config import EvalConfig, from_dict
from pgolf.data.manifest import Dataset
from pgolf.device import DTYPES, pick_device, pick_dtype
from pgolf.errors import ConfigError
from pgolf.options import Parser
from pgolf.ranks import Ranks
from pgolf.scoring.job import ScoreJob
from pgolf.training.run_data import find_dataset
from pgolf.training.run_folder import read_config


def _parser() -> Parser:
    parser = Parser(
        prog="pgolf eval",
        description="Score an artifact in bits per byte, in a fresh process that loads only the "
        "artifact and the validation shards. Beside the config.json of its run it is scored as in "
        "the run, and compared with result.json there.",
        epilog="examples: pgolf eval runs/demo-seed1337; pgolf eval runs/demo-seed1337 "
        "--stride 256; pgolf eval small data=data/mine",
    )
    parser.add_argument("artifact", type=Path, help="artifact file, or the folder of its run")
    parser.add_argument("--data", type=Path, help="folder of shards; default: the run's")
    parser.add_argument("--tokenizer", type=Path, help="default: the one of the shards")
    parser.add_argument("--stride", type=int, help="targets a window scores; default: the run's")
    parser.add_argument(
        "--val-tokens", type=int, help="first N tokens only, 0 = all; default: the run's"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", "--compute-dtype", dest="dtype", choices=("auto", *DTYPES),
        help="default: the run's",
    )  # fmt: skip
    return parser


def differences(run: Path, artifact: Path, now: dict[str, Any]) -> str:
    """How a score compares with the one that result.json beside the artifact states, in a line.

    Args:
        now: fields of result.json as this score has them.

    Returns:
        '' where no result of this very file is known.
    """
    try:
        then = json.loads((run / "result.json").read_bytes())
        if artifact.name != "artifact" or then["bytes_model"] != artifact.stat().st_size:
            return ""
        changed = [f"{k} {then[k]} there, {v} here" for k, v in now.items() if then[k] != v]
        changed = [c for c in changed if not c.startswith("val_bpb ")]
        if abs(then["val_bpb"] - now["val_bpb"]) < 5e-7:
            return "the run's own score"
        why = "; ".join(changed) or "other rounding of this machine or its libraries"
        return f"the run's own score is {then['val_bpb']:.6f}: {why}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def main(argv: list[str]) -> int:
    """Score, print one line, and compare that with the run's own score."""
    args = _parser().parse_args(argv)
    artifact = artifact_of(args.artifact)
    run = artifact.parent
    trained = from_dict(read_config(run)) if (run / "config.json").is_file() else None
    if not args.data and trained is None:
        raise ConfigError(
            f"{artifact}: no config.json beside it that names shards to score: use data=FOLDER"
        )
    scored = trained.eval if trained else EvalConfig()
    stride = scored.stride if args.stride is None else args.stride
    val_tokens = scored.val_tokens if args.val_tokens is None else args.val_tokens
    dtype_name = args.dtype or (trained.run.compute_dtype if trained else "auto")
    if stride < 1 or val_tokens < 0:
        raise ConfigError("--stride must be at least 1 and --val-tokens at least 0")
    if args.data:
        dataset = Dataset.open(args.data, args.tokenizer)
    else:
        dataset = find_dataset(run, trained.data, tokenizer=args.tokenizer)
    device = pick_device(args.device)
    dtype = pick_dtype(dtype_name, device)[0]
    # Sums of other batches round differently: the run's, so that its score is repeated.
    settings = replace(scored, stride=stride, val_tokens=val_tokens)
    job = ScoreJob.of(artifact, dataset, settings, Ranks(0, 1, device), dtype, "scoring")
    result = job.ask()
    meta, sums = result.meta, result.sums
    print(
        f"val_bpb {sums.bpb:.6f}  val_loss {sums.loss:.6f} nats/token  stride {stride}  "
        f"{sums.targets:,} targets  {sums.bytes:,} bytes  corpus {dataset.corpus}  "
        f"{result.seconds:.1f} s"
    )
    if dataset.corpus != meta["corpus"]:
        print(f"trained on {meta['corpus']}: BPB of different corpora is not comparable")
    same = {
        "val_bpb": sums.bpb,
        "corpus_sha256": dataset.sha256,
        "stride": stride,
        "val_targets": sums.targets,
        "scored_by": {"ranks": 1, "device": device.type, "dtype": job.dtype},
    }
    if comparison := differences(run, artifact, same):
        print(comparison)
    return 0
