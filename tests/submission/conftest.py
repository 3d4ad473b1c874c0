"""A finished tiny run, made without training, and its script."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pgolf.artifact.pack import write_artifact
from pgolf.config import Config, to_dict, with_overrides
from pgolf.data.manifest import Dataset
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.quant.quantize import quantize
from pgolf.ranks import Ranks
from pgolf.scoring.job import ScoreJob
from pgolf.submission.script import Script, build_script

from ..training.tiny import TINY

# Refuses pgolf wherever it is installed: a script has to bring its own.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pgolf":
            raise ModuleNotFoundError(f"{name} is hidden")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="session")
def config(shards) -> Config:
    """A model with every technique that trains in milliseconds, with one codec."""
    settings = dict(word.split("=") for word in TINY)
    settings |= {
        "data": str(shards), "tokenizer": str(shards / "tokenizer.model"), "codec": "zstd",
        "out": "runs/somewhere", "device": "cpu", "documents": "true",
    }  # fmt: skip
    return with_overrides(Config(recipe="demo"), settings)


@pytest.fixture(scope="session")
def script(config) -> Script:
    return build_script(config)


@pytest.fixture(scope="session")
def make_run(config, shards, tmp_path_factory):
    """A run folder as training leaves it, of a model with random weights."""

    def make(seed: int = 1337, **changes: str) -> Path:
        path = tmp_path_factory.mktemp("runs") / f"seed{seed}"
        path.mkdir()
        settings = with_overrides(config, {"seed": seed, **changes})
        dataset = Dataset.open(shards)
        model = GPT(settings.model)
        init_weights(model, seed)
        meta = {
            "model": dataclasses.asdict(settings.model), "seq_len": settings.data.seq_len,
            "recipe": "demo", "seed": seed, "corpus": dataset.corpus,
            "tokenizer_sha256": dataset.tokenizer_sha256,
        }  # fmt: skip
        quantized = quantize(model.export_state(), settings.quant)
        report = write_artifact(path / "artifact", quantized, meta, settings.artifact, False)
        result = scored(path / "artifact", settings, dataset) | {
            "bytes_model": report.total, "steps": 20, "train_seconds": 1.5, "recipe": "demo",
            "scored_by": {"ranks": 1, "device": "cpu", "dtype": "fp32"},
            "provenance": {"device": "a CPU", "torch": torch.__version__, "threads": 1},
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(to_dict(settings)))
        (path / "result.json").write_text(json.dumps(result))
        lines = [
            {"kind": "train", "step": 1, "seconds": 0.147, "loss": 5.99, "ms_per_step": 147.2},
            {"kind": "event", "step": 14, "seconds": 1.2, "text": "late QAT on for 18 matrices"},
            {"kind": "val", "step": 20, "seconds": 1.5, "loss": 4.51, "bpb": 2.44},
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
        return path

    return make


def scored(artifact: Path, config: Config, dataset: Dataset) -> dict[str, float]:
    """The score of an artifact, in this process."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    sums = ScoreJob.of(artifact, dataset, config.eval, ranks, torch.float32).run().sums
    return {"val_loss": sums.loss, "val_bpb": sums.bpb}


@pytest.fixture(scope="session")
def one_run(make_run) -> Path:
    return make_run()


@pytest.fixture(scope="session")
def hidden(tmp_path_factory) -> dict[str, str]:
    """An environment in which no process finds pgolf."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def alone(script, one_run, shards, hidden, tmp_path):
    """Run the script in a folder that holds it and the artifact alone, with pgolf hidden."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(script.data)
    (folder / "artifact").write_bytes((one_run / "artifact").read_bytes())

    def run(*arguments: str, launcher: tuple[str, ...] = (), **environment: str) -> SimpleNamespace:
        names = {**os.environ, **hidden, "DATA_PATH": str(shards), **environment}
        return subprocess.run(
            [sys.executable, *launcher, *(arguments or ("train_gpt.py",))],
            cwd=folder, env=names, capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    run.folder = folder
    return run
