"""Compiled code that is kept: what a run does with files that are there, whole, strange or not."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pgolf.config import Config, with_overrides
from pgolf.ranks import ALONE
from pgolf.training import compile_cache as module
from pgolf.training.compile_cache import (
    KEPT,
    MAGIC,
    SUFFIX,
    Unusable,
    kept_code,
    key_of,
    place,
    read,
    write,
)
from pgolf.training.phases import Phases

KEY = "0123456789abcdef"


@pytest.fixture
def torchs(monkeypatch):
    """Stands in for torch: what was loaded, how many graphs a compilation misses."""
    state = SimpleNamespace(loaded=[], misses=0, new=2, understands=True)

    def load(part):
        state.loaded.append(part)
        state.new = 0
        return "info" if state.understands else None

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", "info"))
    monkeypatch.setattr(module, "_misses", lambda: state.misses)
    monkeypatch.setattr(module, "key_of", lambda trainer: KEY)
    return state


GPU = replace(ALONE, device=torch.device("cuda"))


def compiled(torchs, named, ranks=GPU):
    """The lines and the ledger's word of a run that compiles once."""
    said, phases = [], Phases()
    trainer = SimpleNamespace(
        compiled=True, ranks=ranks, say=said.append, session=SimpleNamespace(phases=phases),
        config=with_overrides(Config(), {"compile_cache": str(named)}),
    )  # fmt: skip
    with kept_code(trainer):
        torchs.misses += torchs.new
    return said, phases.ledger(0.0, {})["compile"]["cache"]


def test_the_second_run_is_warm(tmp_path, torchs):
    """From a file that travels: its name is the user's."""
    file = tmp_path / "new" / "carried"
    assert compiled(torchs, file) == ([f"compiled code: cold, {file} had nothing for it"], "cold")
    before = file.read_bytes()
    moved = file.rename(tmp_path / "moved")
    assert compiled(torchs, moved) == ([f"compiled code: warm, from {moved}"], "warm")
    assert torchs.loaded == [b"code"] and moved.read_bytes() == before


def test_what_torch_has_itself_is_warm_and_kept(tmp_path, torchs):
    torchs.new = 0
    (said,), cache = compiled(torchs, tmp_path)
    assert said == "compiled code: warm, from torch's own files on this machine"
    assert cache == "warm"
    assert read(tmp_path / (KEY + SUFFIX), KEY) == {0: b"code"}


def damaged(content):
    return content[:-1] + b"!"


def cut(content):
    return content[: len(content) // 2]


def other_key(content):
    return content.replace(KEY.encode(), b"f" * 16)


@pytest.mark.parametrize(
    "change, why",
    [(damaged, "is damaged"), (cut, "is damaged"), (other_key, "is of another model, ")],
)
def test_a_file_of_no_use_is_a_warning_and_replaced(tmp_path, torchs, change, why):
    file = tmp_path / "carried"
    write(file, KEY, {0: b"old"})
    whole = change(file.read_bytes())
    file.write_bytes(whole)
    said, cache = compiled(torchs, file)
    assert said[0].startswith(f"warning: compile_cache: {file} {why}") and cache == "cold"
    assert torchs.loaded == [] and read(file, KEY) == {0: b"code"}


def test_a_file_of_another_program_is_left_alone(tmp_path, torchs):
    file = tmp_path / "thesis.txt"
    file.write_bytes(b"years of work")
    said, cache = compiled(torchs, file)
    assert "is no file of compiled code, and is left as it is" in said[0] and cache == "cold"
    assert file.read_bytes() == b"years of work"


def test_code_that_torch_does_not_take_is_a_warning(tmp_path, torchs, monkeypatch):
    write(tmp_path / "file", KEY, {0: b"old"})
    torchs.understands = False
    said, _ = compiled(torchs, tmp_path / "file")
    assert said[0].endswith("is nothing that this torch understands: compiling anew")

    def fails(part):
        raise KeyError("artifact")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", fails)
    said, _ = compiled(torchs, tmp_path / "file")
    assert said[0].endswith("KeyError: 'artifact': compiling anew")


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, torchs):
    (tmp_path / "file").write_text("no folder")
    said, cache = compiled(torchs, tmp_path / "file" / "carried")
    assert "cannot be read: Not a directory" in said[0] and cache == "cold"
    assert said[-1].startswith("warning: compile_cache: cannot write ") or "Not a" in said[-1]
    assert said[-1].endswith("; training goes on")


def test_a_rank_without_one_is_without_one_for_all(tmp_path, torchs, monkeypatch):
    """compile_cache=off is each rank's own setting; what ranks exchange is not."""
    ranks = SimpleNamespace(
        first=True, world=2, device=torch.device("cuda", 0), gather=lambda mine: [mine, [0.0]]
    )
    monkeypatch.setattr(module, "gathered", None)  # nobody may call it
    compiled(torchs, tmp_path, ranks)
    assert not list(tmp_path.iterdir()) and not torchs.loaded


def test_each_gpu_has_its_part(tmp_path, torchs, monkeypatch):
    """Rank 0 writes those of all, on two machines; where a part is missing the rank is cold."""
    ranks = SimpleNamespace(
        first=True, world=4, device=torch.device("cuda", 0), gather=lambda mine: [mine] * 4
    )
    every = [(0, b"code"), (1, b"one"), (0, b"there"), (1, b"there")]
    monkeypatch.setattr(module, "gathered", lambda ranks, mine: every)
    compiled(torchs, tmp_path, ranks)
    file = tmp_path / (KEY + SUFFIX)
    assert read(file, KEY) == {0: b"code", 1: b"one"}
    ranks.device, ranks.first = torch.device("cuda", 1), False
    assert compiled(torchs, tmp_path, ranks)[1] == "warm" and torchs.loaded == [b"one"]
    ranks.device, torchs.new = torch.device("cuda", 2), 2
    assert compiled(torchs, tmp_path, ranks)[1] == "cold"


def test_a_rank_that_is_warm_sends_its_part_as_well(tmp_path, torchs, monkeypatch):
    """If another one is cold: all take part in the exchange, or none."""
    write(tmp_path / "file", KEY, {0: b"old"})
    others = iter([1.0, 1.0, 1.0, 0.0])  # wants a file, lacks code; wants one, and has it
    ranks = SimpleNamespace(
        first=True, world=2, device=torch.device("cuda", 0),
        gather=lambda mine: [mine, [next(others)]],
    )  # fmt: skip
    sent = []
    monkeypatch.setattr(module, "gathered", lambda ranks, mine: sent.append(mine) or [mine, mine])
    assert compiled(torchs, tmp_path / "file", ranks)[1] == "warm" and sent == [(0, b"code")]
    compiled(torchs, tmp_path / "file", ranks)
    assert len(sent) == 1 and not list(others)


def test_a_folder_has_so_many_files_at_most(tmp_path):
    for n in range(KEPT + 4):
        key = f"{n:016x}"
        write(tmp_path / (key + SUFFIX), key, {0: b"code"})
        os.utime(tmp_path / (key + SUFFIX), (n, n))
    assert read(tmp_path / f"{3:016x}{SUFFIX}", f"{3:016x}")  # used: the newest now
    write(tmp_path / (KEY + SUFFIX), KEY, {0: b"code"})
    left = {f.name.removesuffix(SUFFIX) for f in tmp_path.iterdir()}
    assert len(left) == KEPT + 1 and {KEY, f"{3:016x}"} <= left and f"{4:016x}" not in left


def test_places(tmp_path, monkeypatch):
    def where(named):
        return str(place(with_overrides(Config(), {"compile_cache": named}), KEY))

    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.setenv("HOME", "/home/me")
    assert where("auto") == f"/c/pgolf/compile/{KEY}{SUFFIX}"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert where("auto") == f"/home/me/.cache/pgolf/compile/{KEY}{SUFFIX}"
    assert where("~/code") == "/home/me/code"
    assert where("new/") == f"new/{KEY}{SUFFIX}" and where(str(tmp_path)).endswith(KEY + SUFFIX)


@pytest.mark.parametrize("word", ["off", ""])
def test_off_touches_nothing(tmp_path, torchs, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    for words in ("cold", "warm, from torch's own files on this machine"):
        assert compiled(torchs, word) == ([f"compiled code: {words}"], words[:4])
        torchs.new = 0
    assert not list(tmp_path.iterdir()) and not torchs.loaded


def test_on_a_cpu_there_is_no_file(tmp_path, torchs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled(torchs, "auto", ALONE) == (["compiled code: cold"], "cold")
    (warning, _), _ = compiled(torchs, tmp_path / "code", ALONE)
    assert warning.endswith("/code: code for a CPU is not kept in a file")
    assert not list(tmp_path.iterdir()) and not torchs.loaded


def test_the_key_is_of_what_decides_the_code():
    def key(tokens=128, dtype=torch.float32, ops="reference", **values):
        return key_of(SimpleNamespace(
            config=with_overrides(Config(), values), ranks=ALONE, local_tokens=tokens,
            model=SimpleNamespace(compute_dtype=dtype), ops={"xsa": ops},
        ))  # fmt: skip

    same = [key(), key(seed=7), key(out="there"), key(matrix_lr=0.5), key(compile_cache="off")]
    other = [key(64), key(dtype=torch.bfloat16), key(ops="cpu"), key(dim=1024), key(seq_len=1024)]
    assert len(set(same)) == 1 and len({key(), *other}) == 1 + len(other)


def test_a_file_begins_with_what_it_is(tmp_path):
    write(tmp_path / "file", KEY, {0: b"a", 3: b"bc"})
    assert (tmp_path / "file").read_bytes().startswith(MAGIC + KEY.encode())
    assert read(tmp_path / "file", KEY) == {0: b"a", 3: b"bc"} and read(tmp_path / "no", KEY) == {}
    with pytest.raises(Unusable, match="cannot be read: Is a directory"):
        read(tmp_path, KEY)
