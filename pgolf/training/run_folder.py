"""The folder of a run: config.json, data.json, metrics.jsonl, checkpoints, artifact, result.json.

checkpoints/step-N holds state.pt and manifest.json with its size and sha256; the folder appears
under its name only when it is complete, and the two newest are kept.
"""

import errno
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from pgolf.config import Config, EvalConfig, from_dict, to_dict, with_overrides
from pgolf.data.manifest import TOKENIZER, Dataset
from pgolf.errors import ConfigError, DataError, InUseError, StorageError
from pgolf.files import atomic_folder, atomic_write, claim, sha256_of, storage_errors
from pgolf.training.run_data import FILE as DATA_FILE
from pgolf.training.run_data import Identity

KEEP = 2
# What may differ between the first part of a run and its continuation. Data are compared by hash.
FREE_KEYS = {
    "run.resume", "run.out", "run.device", "run.patience", "run.log_every", "run.checkpoint_every",
    "run.profile", "run.log", "run.graphs", "run.compile_cache", "data.data", "data.tokenizer",
    *(f"eval.{f.name}" for f in fields(EvalConfig)),
}  # fmt: skip


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested config as 'section.key' -> value."""
    out = {}
    for section, content in values.items():
        if isinstance(content, dict):
            out.update({f"{section}.{k}": v for k, v in content.items()})
        else:
            out[section] = content
    return out


def read_config(run: Path) -> dict[str, Any]:
    """What config.json of a run folder holds.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    file = run / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{run} is no run folder: it has no config.json") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read ({e}): restore it, or train again") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no JSON object: restore it, or train again")
    return values


def refuse_changes(run: Path, old: Config, new: Config, free: Set[str]) -> None:
    """Raise ConfigError if settings that are not free differ; it lists each, old and new."""
    before, after = flat(to_dict(old)), flat(to_dict(new))
    changed = [key for key in before if before[key] != after[key] and key not in free]
    if not changed:
        return
    listed = "; ".join(f"{key}={before[key]} then, {after[key]} now" for key in changed)
    qat = ""
    if any(key.startswith("quant.qat_") for key in changed):
        qat = " Late QAT goes on where, and as, it was to at the start of the run."
    raise ConfigError(
        f"cannot resume {run}: its settings differ ({listed}). Leave them out, and they are read "
        f"from {run / 'config.json'}, or train anew with another out=FOLDER.{qat}"
    )


def resumed_config(
    recipe: str, as_published: bool | None, overrides: Mapping[str, Any], run: Path
) -> Config:
    """The settings of a run that goes on: those of its config.json, with `overrides` on top.

    Args:
        recipe: the one that was named.
        as_published: None if it was not given.

    Raises:
        ConfigError: there is no run, or an override changes what may not; lists all of these.
    """
    if not (run / "config.json").is_file():
        raise ConfigError(f"nothing to resume in {run}: there is no config.json")
    old = from_dict(read_config(run))
    exact = old.as_published if as_published is None else as_published
    new = with_overrides(replace(old, recipe=recipe, as_published=exact), overrides)
    refuse_changes(run, old, new, FREE_KEYS)
    return new


class RunFolder:
    """Paths and files of one run. Only rank 0 creates or writes; the others get `writes=False`.

    Attributes:
        failed: the last write that training has gone on without, None if none failed.
        mirrors: what takes the lines of metrics.jsonl too (`write`).
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.artifact = path / "artifact"
        self.result = path / "result.json"
        self.metrics = path / "metrics.jsonl"
        self.failed: StorageError | None = None
        self.mirrors = []

    @classmethod
    @contextmanager
    def choose(cls, config: Config) -> Iterator[Path]:
        """The folder of a new or resumed run, which no other run gets while the block runs.

        Raises:
            ConfigError: out= exists already, or there is nothing to resume.
            InUseError: another run is in out=.
        """
        out = config.run.out
        if config.run.resume and not out:
            raise ConfigError("resume=true needs out=FOLDER, the run to go on with")
        base = f"runs/{config.recipe}-seed{config.run.seed}"
        names = (base if n == 1 else f"{base}-{n}" for n in range(1, 10_000))
        for path in (Path(out),) if out else map(Path, names):
            with ExitStack() as stack:
                try:
                    stack.enter_context(claim(path))
                except InUseError:
                    if out:
                        raise
                    continue
                # Only now does nobody else begin there.
                if out:
                    cls._check_out(path, config.run.resume)
                elif path.exists():
                    continue
                yield path
                return
        raise ConfigError(f"{base}-2 to -9999 all exist: choose a folder with out=FOLDER")

    @staticmethod
    def _check_out(path: Path, resume: bool) -> None:
        """Raise ConfigError unless a run can begin, or go on, in the folder that out= names."""
        begun = (path / "config.json").is_file()
        if resume and not begun:
            raise ConfigError(f"nothing to resume in {path}: there is no config.json")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"out={path} is a file: choose a folder")
        if begun and not resume:
            raise ConfigError(
                f"out={path} holds a run already: choose another folder, or go on with resume=true"
            )

    def open(self, config: Config, dataset: Dataset) -> None:
        """Start a folder (config, data, tokenizer), or check that a resumed one fits."""
        file = self.path / "config.json"
        if config.run.resume:
            old = from_dict(read_config(self.path))
            refuse_changes(self.path, old, config, FREE_KEYS)
            # What is free is used from here on, and is what commands on this folder go by.
            config = with_overrides(config, {"out": old.run.out, "resume": False})
            if config != old:
                atomic_write(file, json.dumps(to_dict(config), indent=2) + "\n")
            for left in self.path.rglob(".*.tmp"):  # of a run that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        else:
            atomic_write(file, json.dumps(to_dict(config), indent=2) + "\n")
            Identity.of(dataset).write(self.path)
            atomic_write(self.path / TOKENIZER, dataset.tokenizer_path.read_bytes())

    def discard(self) -> None:
        """Free the name again, after a run that failed before its first step."""
        if self.writes:
            with suppress(OSError):  # out= may be a folder that holds more
                for name in ("config.json", DATA_FILE, TOKENIZER, self.metrics.name):
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()

    def log(self, **line: Any) -> None:
        """Append one line to metrics.jsonl; what can't be written is no reason to stop a run."""
        if self.writes:
            try:
                with storage_errors(self.metrics), open(self.metrics, "ab", buffering=0) as f:
                    size, text = f.tell(), (json.dumps(line) + "\n").encode()
                    if f.write(text) != len(text):  # the disk is full: no half line
                        f.truncate(size)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except StorageError as e:
                self.warn(e)
            for mirror in self.mirrors:
                mirror.write(line)

    def warn(self, error: StorageError) -> None:
        """Note that something is not on disk; said once, and by `check` at the end."""
        if self.failed is None:
            print(f"warning: {error}; training goes on without", file=sys.stderr, flush=True)
        self.failed = error

    def check(self) -> None:
        """Raise StorageError if something is not on disk."""
        if self.failed is not None:
            raise StorageError(
                f"the run has ended, but not all of it could be kept in {self.path}: {self.failed}"
            )

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps after `step`: a resumed run will write them again."""
        if self.writes and self.metrics.exists():
            kept = []
            for text in self.metrics.read_text().splitlines():
                try:
                    if json.loads(text)["step"] <= step:
                        kept.append(text)
                except (ValueError, KeyError):
                    continue  # the line that was being written when the run stopped
            atomic_write(self.metrics, "".join(line + "\n" for line in kept))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove all but the newest ones."""
        path = self.path / "checkpoints" / f"step-{step:07d}"
        with atomic_folder(path) as folder:
            file = folder / "state.pt"
            # Through memory: torch's own file writer reports a full disk as an internal error.
            content = io.BytesIO()
            torch.save(state, content)
            file.write_bytes(content.getbuffer())
            manifest = {"step": step, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
            (folder / "manifest.json").write_text(json.dumps(manifest) + "\n")
        for old in self.checkpoints()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    @staticmethod
    def described(checkpoint: Path) -> str:
        """Which one it is, whatever machine reads it."""
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        return f"the checkpoint {checkpoint.name} of sha256 {manifest['sha256'][:12]}..."

    def load(self, device: torch.device) -> tuple[dict[str, Any], Path]:
        """The newest checkpoint that is whole.

        Raises:
            DataError: there is none; the message names what was wrong with each.
        """
        problems = []
        for path in reversed(self.checkpoints()):
            file = path / "state.pt"
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                if sha256_of(file) != manifest["sha256"]:
                    raise ValueError("state.pt does not match its sha256")
                return torch.load(file, map_location=device, weights_only=True), path
            except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as e:
                problems.append(f"{path.name}: {e}")
        raise DataError(
            f"no checkpoint to resume from in {self.path} "
            f"({'; '.join(problems) or 'none was written yet'}): begin anew with another out=FOLDER"
        )
