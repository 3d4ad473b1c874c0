"""Compiled code in a file, for the next run that compiles the same, on this machine or another.

The file has what torch.compiler.save_cache_artifacts gives, by the index of the GPU, which is in
the code: each rank loads its own part before the warm-up, and rank 0 writes all parts after it.
Torch looks every graph up by a key of its own, so a file is never wrong, at most of no use. It
holds code, and torch unpickles it: take a file from nobody whose program you would not run.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pgolf.config import Config, to_dict
from pgolf.errors import StorageError
from pgolf.files import atomic_write, user_cache
from pgolf.training import facts
from pgolf.training.handshake import gathered
from pgolf.training.trainer import Trainer

MAGIC = b"pgolf compiled code 1\n"
SUFFIX = ".compiled"
KEPT = 16  # files of other keys in a folder


class Unusable(Exception):
    """A file that no code is loaded from; says why."""


def key_of(trainer: Trainer) -> str:
    """A hash of what decides the code: versions, sources, device, operators, model and shapes."""
    config, device = trainer.config, trainer.ranks.device
    software = facts.software(config)
    what = {
        **{name: software[name] for name in ("Python", "torch", "triton", "pgolf")},
        **facts.hardware(device, trainer.model.compute_dtype, trainer.ops),
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else "",
        "model": to_dict(config)["model"],
        "pass": (trainer.local_tokens, config.data.seq_len),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def place(config: Config, key: str) -> Path:
    """Where the code of a key is: in a file that compile_cache names, or one of a folder."""
    named = config.run.compile_cache
    if named == "auto":
        return user_cache("compile") / (key + SUFFIX)
    path = Path(os.path.expanduser(named))
    return path / (key + SUFFIX) if named.endswith("/") or os.path.isdir(path) else path


def write(path: Path, key: str, parts: Mapping[int, bytes]) -> None:
    """Replace a file, and remove the oldest ones of a folder of them.

    Raises:
        StorageError: it could not be written.
    """
    sizes = json.dumps({index: len(part) for index, part in parts.items()}).encode()
    body = sizes + b"\n" + b"".join(parts.values())
    digest = hashlib.sha256(body).hexdigest()
    atomic_write(path, MAGIC + f"{key} {digest}\n".encode() + body)
    if path.name == key + SUFFIX:
        with suppress(OSError):
            files = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda f: f.stat().st_mtime)
            for old in files[: -KEPT - 1]:
                old.unlink(missing_ok=True)


def read(path: Path, key: str) -> dict[int, bytes]:
    """The parts of a file by the index of the GPU; none if there is no file.

    Raises:
        Unusable: it holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise Unusable(f"cannot be read: {e.strerror}") from None
    if not content.startswith(MAGIC):
        raise Unusable("is no file of compiled code, and is left as it is")
    head, _, body = content[len(MAGIC) :].partition(b"\n")
    its_key, _, digest = head.partition(b" ")
    if digest.decode(errors="replace") != hashlib.sha256(body).hexdigest():
        raise Unusable("is damaged")
    if its_key != key.encode():
        raise Unusable("is of another model, machine or version")
    sizes, _, rest = body.partition(b"\n")
    parts = {}
    for index, size in json.loads(sizes).items():
        parts[int(index)], rest = rest[:size], rest[size:]
    with suppress(OSError):
        os.utime(path)  # the oldest are removed
    return parts


@contextmanager
def kept_code(trainer: Trainer) -> Iterator[None]:
    """A block that compiles, on a GPU with an earlier run's code, and leaves it for the next one.

    Says whether it was `warm`, with nothing to compile, and puts that into the ledger. Whatever
    is wrong with the file is a warning.
    """
    if not trainer.compiled:
        yield
        return
    key = key_of(trainer)
    path = place(trainer.config, key) if _wanted(trainer) else None
    loaded = path is not None and _load(trainer, path, key)
    before = _misses()
    yield
    cold = _misses() > before
    trainer.session.phases.cache = "cold" if cold else "warm"
    if cold:
        origin = "cold" if path is None else f"cold, {path} had nothing for it"
    else:
        origin = f"warm, from {path}" if loaded else "warm, from torch's own files on this machine"
    trainer.say(f"compiled code: {origin}")
    if path is not None and any(
        lacks for (lacks,) in trainer.ranks.gather([float(cold or not loaded)])
    ):
        _save(trainer, path, key)


def _wanted(trainer: Trainer) -> bool:
    """Whether a file is used: by all ranks or none, as one alone would wait for the others.

    Not on a CPU, where g++ compiles anew whatever is in it.
    """
    named, on_gpu = trainer.config.run.compile_cache, trainer.ranks.device.type == "cuda"
    if not on_gpu and named not in ("auto", "off", ""):
        trainer.say(f"warning: compile_cache={named}: code for a CPU is not kept in a file")
    wants = on_gpu and named not in ("off", "")
    return all(wants for (wants,) in trainer.ranks.gather([float(wants)]))


def _misses() -> int:
    """Graphs that Inductor had to compile so far, also past its cache."""
    counters = torch._dynamo.utils.counters["inductor"]
    return counters["fxgraph_cache_miss"] + counters["fxgraph_cache_bypass"]


def _index(trainer: Trainer) -> int:
    return trainer.ranks.device.index or 0


def _load(trainer: Trainer, path: Path, key: str) -> bool:
    """Give torch this rank's part of a file; whether there was one."""
    try:
        part = read(path, key).get(_index(trainer))
        if part is None:
            return False
        if torch.compiler.load_cache_artifacts(part) is None:
            raise Unusable("is nothing that this torch understands")
        return True
    except Unusable as e:
        trainer.say(f"warning: compile_cache: {path} {e}: compiling anew")
    except Exception as e:  # of torch's, which promises nothing about it
        trainer.say(f"warning: compile_cache: {path}: {type(e).__name__}: {e}: compiling anew")
    return False


def _save(trainer: Trainer, path: Path, key: str) -> None:
    """Write what all ranks have compiled; rank 0 does, unless another program's file is there."""
    made = torch.compiler.save_cache_artifacts()
    ranks = trainer.ranks
    mine = _index(trainer), made[0] if made else b""
    every = gathered(ranks, mine) if ranks.world > 1 else [mine]
    parts = {index: part for index, part in reversed(every) if part}
    if not ranks.first or not parts:
        return
    try:
        with suppress(FileNotFoundError), open(path, "rb") as f:
            if f.read(len(MAGIC)) != MAGIC:
                return
        write(path, key, parts)
    except (OSError, StorageError) as e:
        trainer.say(f"warning: compile_cache: {e}; training goes on")
