"""The contest's record folder: script, artifact, README, submission.json, logs, requirements.

Nothing is written before the script, alone in an empty folder, has scored the artifact to the bits
per byte of the run's result.json: to every printed digit if one process on a CPU scored the run,
elsewhere within `TOLERANCE`.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.child import run_script
from pgolf.config import Config, from_dict, to_dict
from pgolf.device import DTYPES, pick_device, pick_dtype
from pgolf.errors import BudgetError, ConfigError, PgolfError
from pgolf.files import atomic_folder, atomic_write, claim
from pgolf.recipes.recipe import CONTEST_BYTES
from pgolf.submission.entry import ARTIFACT
from pgolf.submission.script import Script, build_script, script_parts
from pgolf.submission.texts import console_log, readme, requirements
from pgolf.training.interrupt import resume_command
from pgolf.training.run_data import Identity, find_dataset
from pgolf.training.run_folder import FREE_KEYS, flat, read_config

SCRIPT = "train_gpt.py"
# What may differ between the runs of one record.
OF_ONE_RUN = FREE_KEYS | {"run.seed"}
# A score depends on these, though a resumed run may change them.
OF_ONE_RUN -= {"eval.stride", "eval.val_tokens", "run.device"}
NEEDED = ("val_bpb", "val_loss", "steps", "train_seconds", "bytes_model", "provenance")
# Bits per byte by which two scores of one artifact may differ where sums are taken in another
# order, or matmuls in another precision.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class About:
    """What only the author can say.

    Attributes:
        author, github_id: who submits.
        name, blurb: what the record is called, and one sentence about it.
        date: YYYY-MM-DD.
        track: such as track_10min_16mb.
        hardware: '' for the device that the runs name.
    """

    author: str
    github_id: str
    name: str
    blurb: str
    date: str
    track: str
    hardware: str = ""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        config: its settings.
        result: what result.json holds.
        metrics: the lines of metrics.jsonl.
    """

    path: Path
    config: Config
    result: dict[str, Any]
    metrics: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read the folder of a run.

        Raises:
            ConfigError: it is none, or the run has not finished; names the file.
        """
        config = from_dict(read_config(path))
        try:
            result = json.loads((path / "result.json").read_bytes())
            lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            metrics = [json.loads(line) for line in lines]
            size = (path / ARTIFACT).stat().st_size
        except FileNotFoundError as e:
            name = Path(e.filename).name
            command = resume_command(config.recipe, path)
            raise ConfigError(f"{path} has no {name}: finish the run with `{command}`") from e
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path} cannot be read ({e}): train again") from e
        if missing := [key for key in NEEDED if key not in result]:
            raise ConfigError(f"{path / 'result.json'} states no {missing[0]}: train again")
        if size != result["bytes_model"]:
            raise ConfigError(
                f"{path / ARTIFACT} has {size:,} bytes, result.json is about one of "
                f"{result['bytes_model']:,}: restore it, or train again"
            )
        return cls(path, config, result, metrics)

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def artifact(self) -> Path:
        return self.path / ARTIFACT


def check_alike(runs: Sequence[Run]) -> None:
    """Raise ConfigError unless the runs differ in nothing but their seed."""
    first, *others = runs
    for run in others:
        a, b = flat(to_dict(first.config)), flat(to_dict(run.config))
        if changed := [k for k in sorted(a) if a[k] != b[k] and k not in OF_ONE_RUN]:
            what = "; ".join(f"{k}={a[k]} and {b[k]}" for k in changed)
            raise ConfigError(
                f"{first.path} and {run.path} are not two seeds of one record: {what}"
            )
        here, there = Identity.read(first.path), Identity.read(run.path)
        if here and there and not here.matches(there):
            raise ConfigError(
                f"{first.path} and {run.path} are not two seeds of one record: the second was "
                f"trained on other data ({here.differences(there)})"
            )
    seeds = [run.seed for run in runs]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ConfigError(f"seed {twice[0]} is given twice: name each run once, with its own seed")


def check_budget(runs: Sequence[Run], script: Script) -> None:
    """Raise BudgetError if a run's artifact and the script exceed the limit together."""
    code = len(script.data)
    for run in runs:
        model = run.result["bytes_model"]
        limit = min(run.config.artifact.budget_bytes or CONTEST_BYTES, CONTEST_BYTES)
        if model + code > limit:
            raise BudgetError(
                f"{run.path}: model {model:,} + code {code:,} = {model + code:,} bytes, "
                f"{model + code - limit:,} over the limit of {limit:,}: train with "
                "grid=uniform fit_to_budget=true, or a smaller model"
            )


@dataclass(frozen=True)
class Score:
    """What the script makes of the shipped artifact.

    Attributes:
        loss: nats a token.
        bpb: bits per byte.
        note: how it differs from the run's score; '' if no digit does.
    """

    loss: float
    bpb: float
    note: str


def verify(run: Run, script: Script, data: str | Path = "") -> Score:
    """Score the artifact with the script alone.

    Args:
        data: where the run's shards are now, if they were moved.

    Raises:
        DataError: the shards are not there.
        PgolfError: the script fails, or its score is not that of result.json.
    """
    dataset = find_dataset(run.path, run.config.data, data)
    environment = os.environ | {
        "DATA_PATH": str(dataset.folder.resolve()),
        "TOKENIZER_PATH": str(dataset.tokenizer_path.resolve()),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / SCRIPT).write_bytes(script.data)
        shutil.copy(run.artifact, folder / ARTIFACT)
        done = run_script(SCRIPT, cwd=folder, env=environment, stdout=subprocess.PIPE)
    match = re.search(r"val_loss:(\S+) val_bpb:(\S+)", done.stdout)
    if done.returncode or not match:
        raise PgolfError(f"the script cannot score {run.artifact}: see above")
    return compared(run, *match.groups())


def compared(run: Run, loss: str, bpb: str) -> Score:
    """The script's score, as printed, compared with the run's.

    Raises:
        PgolfError: they differ by more than rounding explains.
    """
    stated = f"{run.result['val_loss']:.8f}", f"{run.result['val_bpb']:.8f}"
    if (loss, bpb) == stated:
        return Score(float(loss), float(bpb), "")
    difference = float(bpb) - float(stated[1])
    differs = f"{bpb} bits per byte, {difference:+.8f} from the {stated[1]} of"
    if must_agree(run):
        threads = run.result["provenance"].get("threads", "as many")
        raise PgolfError(
            f"the script scores {run.artifact} with {differs} result.json: score it where it was "
            f"scored, on the same CPU with {threads} threads (OMP_NUM_THREADS)"
        )
    if not abs(difference) <= TOLERANCE:  # nan is refused too
        raise PgolfError(
            f"the script scores {run.artifact} with {differs} result.json, and rounding explains "
            f"{TOLERANCE:g}: are the shards at {run.config.data.data} those of the run?"
        )
    by = run.result.get("scored_by")
    where = by and f", scored by {by['ranks']} x {by['device']} in {by['dtype']}"
    return Score(float(loss), float(bpb), f"{differs} the run{where or ''}")


def must_agree(run: Run) -> bool:
    """Whether the run was scored as the script is: by one process on a CPU, in the same dtype."""
    device = pick_device("auto")
    if device.type != "cpu" or "scored_by" not in run.result:
        return False
    ranks, kind, dtype = (run.result["scored_by"][k] for k in ("ranks", "device", "dtype"))
    same = DTYPES[dtype] == pick_dtype(run.config.run.compute_dtype, device)[0]
    return (ranks, kind) == (1, "cpu") and same


def submission(
    runs: Sequence[Run], best: Run, script: Script, score: Score, about: About
) -> dict[str, Any]:
    """The content of submission.json: score and sizes of what is shipped, results of all seeds."""
    code = len(script.data)
    results = {str(run.seed): run.result for run in runs}
    values = {
        "author": about.author,
        "github_id": about.github_id,
        "name": about.name,
        "blurb": about.blurb,
        "date": about.date,
        "track": about.track,
        "val_loss": score.loss,
        "val_bpb": score.bpb,
        "bytes_total": best.result["bytes_model"] + code,
        "bytes_code": code,
        "bytes_model": best.result["bytes_model"],
        "seeds": [run.seed for run in runs],
        "seed_results": {
            seed: {
                "val_loss": r["val_loss"],
                "val_bpb": r["val_bpb"],
                "steps": r["steps"],
                "train_seconds": r["train_seconds"],
                "bytes_total": r["bytes_model"] + code,
            }
            for seed, r in results.items()
        },
        "hardware": about.hardware or best.result["provenance"]["device"],
        "pytorch_version": best.result["provenance"]["torch"],
    }
    if len(runs) > 1:
        scores = [r["val_bpb"] for r in results.values()]
        values["val_bpb_mean"] = statistics.fmean(scores)
        values["val_bpb_std"] = statistics.stdev(scores)
    return values


@dataclass(frozen=True)
class Record:
    """What was written.

    Attributes:
        values: the content of submission.json.
        parts: bytes of the script by what they are for, as `script_parts` has them.
        note: how the script's score differs from the run's.
    """

    values: dict[str, Any]
    parts: dict[str, int]
    note: str


def write_record(paths: Sequence[Path], out: Path, about: About, data: str | Path = "") -> Record:
    """Write the record folder of one or more runs.

    Args:
        paths: run folders that differ in their seed alone. The artifact of the best is shipped.
        out: the folder to make.
        data: where the shards of the best run are, if they were moved.

    Raises:
        InUseError: another process makes `out`.
        ConfigError: `out` exists, a run has not finished, or they are of different settings.
        BudgetError: an artifact and the script are too large together.
        PgolfError: the script does not reproduce the score.
    """
    with claim(out):
        if out.exists():
            raise ConfigError(f"{out} exists: choose another folder with --out")
        return _write_record(paths, out, about, data)


def _write_record(paths: Sequence[Path], out: Path, about: About, data: str | Path) -> Record:
    runs = [Run.read(path) for path in paths]
    check_alike(runs)
    best = min(runs, key=lambda run: run.result["val_bpb"])
    script = build_script(best.config)
    check_budget(runs, script)
    score = verify(best, script, data)
    parts = script_parts(best.config)
    values = submission(runs, best, script, score, about)
    with atomic_folder(out) as folder:
        (folder / SCRIPT).write_bytes(script.data)
        shutil.copy(best.artifact, folder / ARTIFACT)
        (folder / "submission.json").write_text(json.dumps(values, indent=2) + "\n")
        page = readme(values, best.config, parts, score.note)
        atomic_write(folder / "README.md", page)
        (folder / "requirements.txt").write_text(requirements(script.libraries))
        for run in runs:
            log = console_log(run.metrics, run.result, len(script.data))
            atomic_write(folder / f"train_seed{run.seed}.log", log)
    return Record(values, parts, score.note)
