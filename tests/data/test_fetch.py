"""`pgolf data fetch` against a local folder in place of the server."""

import json
import shutil
import sys

import numpy as np
import pytest

from pgolf.data import fetch as fetch_module
from pgolf.data.fetch import download, fetch
from pgolf.data.shards import open_shard, write_shard
from pgolf.data.tokenizer import train_tokenizer
from pgolf.errors import ConfigError, DataError, StorageError


class Server:
    """A folder that stands for the repository; counts what is downloaded."""

    def __init__(self, root):
        self.root, self.repo, self.prefix = root, "willdepueoai/parameter-golf", "datasets"
        self.downloads: list[str] = []

    def download(self, repo_id, remote_path, local_dir):
        assert repo_id == self.repo and remote_path.startswith(self.prefix)
        path = remote_path.removeprefix(self.prefix).lstrip("/")
        if not (self.root / path).is_file():
            raise DataError(f"there is no {remote_path} of {repo_id}")
        self.downloads.append(path)
        target = local_dir / remote_path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / path, target)
        return target

    def write_manifest(self, **changes):
        datasets = {"fineweb10B_sp400": (3, 2, "bpe"), "fineweb10B_byte260": (3, 1, "bytes"),
                    "fineweb10B_sp8192": (1, 1, "big"), **changes}  # fmt: skip
        manifest = {
            "datasets": [
                {"name": n, "tokenizer_name": t, "stats": {"files_train": a, "files_val": b}}
                for n, (a, b, t) in datasets.items()
            ],
            "tokenizers": [
                {"name": "bpe", "model_path": "tokenizers/fineweb_400_bpe.model"},
                {"name": "bytes", "path": "tokenizers/bytes.json"},
            ],
        }
        (self.root / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def server(tmp_path, documents, monkeypatch):
    server = Server(tmp_path / "server")
    (server.root / "tokenizers").mkdir(parents=True)
    folder = server.root / "datasets" / "fineweb10B_sp400"
    folder.mkdir(parents=True)
    sp = train_tokenizer(documents, server.root / "tokenizers" / "fineweb_400_bpe.model", 400)
    server.tokens = sp.encode(documents[0], add_bos=True)
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            shard = np.array(server.tokens[: 300 + i])
            write_shard(folder / f"fineweb_{split}_{i:06d}.bin", shard)
    server.write_manifest()
    monkeypatch.setattr(fetch_module, "download", server.download)
    monkeypatch.delenv(fetch_module.REPO_VARIABLE, raising=False)
    monkeypatch.delenv(fetch_module.PREFIX_VARIABLE, raising=False)
    return server


def below(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_contest_layout_arrives(server, tmp_path):
    dataset = fetch("sp400", tmp_path / "data", train_shards=2)
    shards = [f"datasets/fineweb10B_sp400/fineweb_train_{i:06d}.bin" for i in range(2)]
    shards += [f"datasets/fineweb10B_sp400/fineweb_val_{i:06d}.bin" for i in range(2)]
    expected = [*shards, "manifest.json", "tokenizers/fineweb_400_bpe.model"]
    assert below(tmp_path / "data") == expected
    assert sorted(server.downloads) == expected
    assert dataset.corpus == "fineweb10B_sp400" and dataset.vocab_size == 400
    assert [len(dataset.train_shards), len(dataset.val_shards)] == [2, 2]
    assert open_shard(dataset.val_shards[1], 400).tolist() == server.tokens[:301]


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    fetch("sp400", tmp_path / "data", train_shards=1)
    server.downloads.clear()
    fetch("sp400", tmp_path / "data", train_shards=1)
    assert server.downloads == []
    assert len(fetch("sp400", tmp_path / "data").train_shards) == 3, (
        "all, as there are fewer than 80"
    )
    assert [p[-10:] for p in server.downloads] == ["000001.bin", "000002.bin"]
    damaged = tmp_path / "data/datasets/fineweb10B_sp400/fineweb_val_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    server.downloads.clear()
    fetch("sp400", tmp_path / "data")
    assert [p[-14:] for p in server.downloads] == ["val_000001.bin"]


def test_a_broken_off_fetch_goes_on(server, tmp_path, monkeypatch):
    def breaks_off(repo_id, remote_path, local_dir):
        if len(server.downloads) == 4:
            raise KeyboardInterrupt
        return server.download(repo_id, remote_path, local_dir)

    monkeypatch.setattr(fetch_module, "download", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        fetch("sp400", tmp_path / "data")
    assert [p for p in below(tmp_path / "data") if p.endswith(".bin")] == [
        f"datasets/fineweb10B_sp400/fineweb_val_{i:06d}.bin" for i in range(2)
    ]
    monkeypatch.setattr(fetch_module, "download", server.download)
    fetch("sp400", tmp_path / "data").verify()
    assert len(server.downloads) == len(set(server.downloads)) == 7
    assert not (tmp_path / "data" / ".fetch").exists()


def test_a_damaged_download_gets_no_place(server, tmp_path):
    shard = server.root / "datasets/fineweb10B_sp400/fineweb_train_000001.bin"
    write_shard(shard, np.array([1, 400]))
    with pytest.raises(DataError, match="fineweb_train_000001.bin: token 400"):
        fetch("sp400", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("fineweb_train_000001.bin"))
    write_shard(shard, np.array([1, 399]))
    fetch("sp400", tmp_path / "data").verify()


def test_unknown_variant_lists_the_others(server, tmp_path):
    with pytest.raises(DataError, match="no variant 'sp512', it has byte260, sp400, sp8192"):
        fetch("sp512", tmp_path / "data")


def test_a_new_variant_gets_a_new_manifest(server, tmp_path):
    fetch("sp400", tmp_path / "data")
    server.write_manifest(fineweb10B_sp512=(1, 1, "bpe"))
    server.downloads.clear()
    with pytest.raises(DataError, match="there is no datasets/datasets/fineweb10B_sp512"):
        fetch("sp512", tmp_path / "data")
    assert server.downloads == ["manifest.json"]


def test_a_variant_without_sentencepiece_is_refused(server, tmp_path):
    with pytest.raises(DataError, match="states no SentencePiece model .* for byte260"):
        fetch("byte260", tmp_path / "data")


@pytest.mark.parametrize("count", [0, -1, 4])
def test_impossible_number_of_shards(server, tmp_path, count):
    with pytest.raises(ConfigError, match=f"{count} training shards .* sp400 has 1 to 3"):
        fetch("sp400", tmp_path / "data", count)


def test_the_environment_names_another_repository(server, tmp_path, monkeypatch):
    server.repo, server.prefix = "me/mine", ""
    monkeypatch.setenv(fetch_module.REPO_VARIABLE, "me/mine")
    monkeypatch.setenv(fetch_module.PREFIX_VARIABLE, "")
    fetch("sp400", tmp_path / "data", 1)
    server.prefix = "a/b"
    monkeypatch.setenv(fetch_module.PREFIX_VARIABLE, "/a/b/")
    fetch("sp400", tmp_path / "other", 1)


def test_a_file_in_the_way(server, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises((StorageError, DataError), match="data"):
        fetch("sp400", tmp_path / "data")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'pgolf\[data\]'"):
        download("a/b", "datasets/manifest.json", tmp_path)


class TestLibraryErrors:
    """What the library raises, in one line each; no network is touched."""

    @pytest.fixture
    def hub(self):
        reason = "the extra `data` is not installed"
        pytest.importorskip("huggingface_hub.errors", reason=reason)
        return sys.modules["huggingface_hub"]

    def fails(self, hub, monkeypatch, error, kind, message, tmp_path):
        def raises(*args, **kwargs):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", raises)
        with pytest.raises(kind, match=message):
            download("a/b", "datasets/manifest.json", tmp_path)

    def test_offline(self, hub, monkeypatch, tmp_path):
        error = hub.errors.LocalEntryNotFoundError("no connection")
        message = "no connection to the server; .*pgolf data prepare"
        self.fails(hub, monkeypatch, error, DataError, message, tmp_path)

    def test_not_found(self, hub, monkeypatch, tmp_path):
        error = hub.errors.EntryNotFoundError("404")
        message = f"no datasets/manifest.json of .*a/b: check {fetch_module.REPO_VARIABLE}"
        self.fails(hub, monkeypatch, error, DataError, message, tmp_path)

    def test_no_space(self, hub, monkeypatch, tmp_path):
        error = OSError(28, "No space left on device")
        self.fails(hub, monkeypatch, error, StorageError, "No space left", tmp_path)

    def test_anything_else(self, hub, monkeypatch, tmp_path):
        error = RuntimeError("peer closed connection")
        self.fails(hub, monkeypatch, error, DataError, "peer closed .* run the command", tmp_path)
