"""What the script of a submission does: score an artifact, or train one.

    python train_gpt.py [ARTIFACT]                   score; default: `artifact`, beside the script
    torchrun --nproc_per_node=8 train_gpt.py train   train, pack, decode and score

Both run under torchrun or alone. Data and settings come from the environment names of the contest.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pgolf.config import Config, environment_overrides, from_dict, with_overrides
from pgolf.data.contest import ContestLayout
from pgolf.device import dtype_name, pick_dtype
from pgolf.errors import ArtifactError, DataError, PgolfError
from pgolf.files import sha256_of
from pgolf.ranks import Ranks
from pgolf.scoring.job import ScoreJob
from pgolf.scoring.windows import Sums
from pgolf.submission.script import build_script

ARTIFACT = "artifact"


def score_file(path: Path, config: Config, ranks: Ranks) -> Sums:
    """Score an artifact on all ranks together, and print what the contest's scripts print.

    Raises:
        ArtifactError: there is no such file, or it is damaged.
        DataError: shards or tokenizer are missing, or not those that the artifact names.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; name an artifact as the only argument")
    started = time.perf_counter()
    folder = Path(config.data.data)
    tokenizer = config.data.tokenizer or ContestLayout.around(folder).tokenizer_of(folder)
    if not Path(tokenizer).is_file():
        raise DataError(f"no tokenizer at {tokenizer}: set TOKENIZER_PATH to the shards' own")
    dtype = pick_dtype(config.run.compute_dtype, ranks.device)[0]
    job = ScoreJob(
        artifact=str(path), data=str(folder), tokenizer=str(tokenizer),
        tokenizer_sha256=sha256_of(tokenizer), stride=config.eval.stride,
        val_tokens=config.eval.val_tokens, eval_tokens=config.eval.eval_tokens,
        device=str(ranks.device), dtype=dtype_name(dtype), rank=ranks.rank, world=ranks.world,
        progress="scoring",
    )  # fmt: skip
    sums = job.run().sums.over(ranks)
    if ranks.first:
        model, code = path.stat().st_size, len(build_script(config).data)
        print(f"Total submission size: {model + code} bytes (model {model} + code {code})")
        print(
            f"final_roundtrip_exact val_loss:{sums.loss:.8f} val_bpb:{sums.bpb:.8f} "
            f"eval_time:{1000 * (time.perf_counter() - started):.0f}ms",
            flush=True,
        )
    return sums


def train_artifact(config: Config, ranks: Ranks) -> Path:
    """Train and pack; the artifact's place in its run folder."""
    from pgolf.training.export import export
    from pgolf.training.run import train
    from pgolf.training.session import claimed_folder, open_session

    with claimed_folder(config, ranks) as folder:
        session = open_session(config, ranks, folder)
        trainer = train(session, config.recipe)
        trainer.take_export()
        export(session, trainer.model, build_script(session.config), folder.artifact)
        folder.check()
    torch.set_float32_matmul_precision("highest")  # as in a process that only scores
    return folder.artifact


def configure(settings: dict[str, Any]) -> Config:
    """The run's settings with those of the environment; data where the contest has them."""
    config = from_dict(settings)
    data = f"data/datasets/fineweb10B_sp{config.model.vocab_size}"
    return with_overrides(config, {"data": data} | environment_overrides())


def main(settings: dict[str, Any]) -> int:
    """Do what the command line says; returns the exit code.

    Args:
        settings: the run's configuration, as `from_dict` takes it.
    """
    arguments = sys.argv[1:]
    try:
        config = configure(settings)
        ranks = Ranks.start(config.run.device)
        try:
            path = Path(arguments[0] if arguments else Path(sys.argv[0]).with_name(ARTIFACT))
            if arguments == ["train"]:
                path = train_artifact(config, ranks)
            score_file(path, config, ranks)
        finally:
            ranks.stop()
    except PgolfError as e:
        print(f"error (rank {os.environ.get('RANK', 0)}): {e}", file=sys.stderr)
        return e.exit_code
    return 0
