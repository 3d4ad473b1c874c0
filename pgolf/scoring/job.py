"""Scores an artifact in this process, or in a fresh one.

It loads the artifact, the validation shards and the tokenizer (for byte counts alone).
"""

import dataclasses
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgolf import errors
from pgolf.artifact.load import load_model
from pgolf.child import run_module
from pgolf.config import EvalConfig
from pgolf.data.manifest import Dataset
from pgolf.data.shards import load_validation
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import DTYPES, dtype_name
from pgolf.errors import DataError, PgolfError
from pgolf.ops.compile import compile_graph
from pgolf.ranks import Ranks
from pgolf.scoring.bpb import ByteTable, refuse_if_foreign
from pgolf.scoring.windows import Sums, evaluate


@dataclass(frozen=True)
class Score:
    """The result of a job.

    Attributes:
        meta: what the artifact says of itself.
        sums: over the windows of one rank.
        seconds: for scoring, without loading.
    """

    meta: dict[str, Any]
    sums: Sums
    seconds: float


@dataclass(frozen=True)
class ScoreJob:
    """All that a score depends on.

    Attributes:
        artifact, data, tokenizer: paths: a file, the folder of shards, their tokenizer.
        tokenizer_sha256: of the tokenizer's file.
        stride: targets that a window scores.
        val_tokens: how many tokens are scored, 0 = all.
        eval_tokens: tokens a forward pass, at most.
        device, dtype: as torch and `DTYPES` name them.
        rank, world: each rank scores its part of the windows.
        progress: label of the first rank's progress line; '' shows none.
    """

    artifact: str
    data: str
    tokenizer: str
    tokenizer_sha256: str
    stride: int
    val_tokens: int
    eval_tokens: int
    device: str
    dtype: str
    rank: int = 0
    world: int = 1
    progress: str = ""

    @classmethod
    def of(
        cls, artifact: Path, dataset: Dataset, scored: EvalConfig, ranks: Ranks,
        dtype: torch.dtype, progress: str = "",
    ) -> "ScoreJob":  # fmt: skip
        """The job of one of the ranks: an artifact on the validation shards of a data set."""
        return cls(
            str(artifact), str(dataset.folder), str(dataset.tokenizer_path),
            dataset.tokenizer_sha256, scored.stride, scored.val_tokens, scored.eval_tokens,
            str(ranks.device), dtype_name(dtype), ranks.rank, ranks.world, progress,
        )  # fmt: skip

    def run(self) -> Score:
        """Score in this process.

        Raises:
            ArtifactError: the artifact is damaged.
            DataError: shards or tokenizer are, or they are not those of the artifact.
        """
        device = torch.device(self.device)
        model, meta = load_model(self.artifact, device, DTYPES[self.dtype])
        if self.tokenizer_sha256 != meta["tokenizer_sha256"]:
            raise DataError(
                f"{self.tokenizer} is not the tokenizer of {self.artifact}: its sha256 differs "
                "from the one that the artifact names"
            )
        length = meta["seq_len"]
        sp = load_tokenizer(self.tokenizer)
        size = min(sp.get_piece_size(), model.config.vocab_size)
        tokens = load_validation(Path(self.data), size, length, self.val_tokens)
        refuse_if_foreign(sp, tokens, self.tokenizer, self.data)
        table = ByteTable(sp, model.config.vocab_size)
        forward = compile_graph(model, model.ops, device) if device.type == "cuda" else model
        started = time.perf_counter()
        sums = evaluate(
            forward, tokens, table, length, self.stride, self.eval_tokens,
            Ranks(self.rank, self.world, device), self.progress,
        )  # fmt: skip
        return Score(meta, sums, time.perf_counter() - started)

    def ask(self) -> Score:
        """Score in a process of its own.

        Raises:
            PgolfError: what the process reports, or that it died.
        """
        job = json.dumps(dataclasses.asdict(self))
        done = run_module("pgolf.scoring", job, stdout=subprocess.PIPE)
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            raise PgolfError(
                f"the scoring process ended with exit code {done.returncode}; see above"
            )
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise getattr(errors, answer["kind"], PgolfError)(answer["error"])
        return Score(answer["meta"], Sums(**answer["sums"]), answer["seconds"])
