"""Ranks that do not come together: one line, at once. No other rank is there."""

import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pgolf import ranks as module
from pgolf.api import start
from pgolf.errors import TrainingError
from pgolf.training.joining import exchange_once, join

CUDA = torch.device("cuda")
NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, NCCL version 2.27.3
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 18000
"""


@pytest.fixture
def first_of_two(monkeypatch):
    """The environment of rank 0, with a port that another process has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": taken.getsockname()[1]}  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        yield values
    assert not dist.is_initialized()


def test_a_port_in_use_is_named(first_of_two):
    port = f"MASTER_PORT={first_of_two['MASTER_PORT']} is in use"
    with pytest.raises(TrainingError, match=f"^{port}, .*choose another port, or .*--standalone"):
        join("cpu")
    with pytest.raises(TrainingError, match=port):
        start("demo", {"device": "cpu"})
    with pytest.raises(TrainingError, match=port):  # a rank that has something else to say
        start("demo", {"device": "cpu", "lauers": 2})


def test_no_address_is_named(first_of_two, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR")
    told = r"the 2 ranks .* MASTER_ADDR=\(not set\), MASTER_PORT=\d+: .*: start them with torchrun"
    with pytest.raises(TrainingError, match=told):
        join("cpu")


def test_ranks_that_do_not_come_are_counted(first_of_two, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setattr(module, "TIMEOUT", module.timedelta(milliseconds=100))
    with pytest.raises(TrainingError, match="do not meet at .*: .*1/2 clients joined"):
        join("cpu")


def test_a_torch_without_nccl_is_named(first_of_two, monkeypatch, tmp_path):
    def init_process_group(backend, timeout):
        assert backend == "nccl"
        raise RuntimeError("Distributed package doesn't have NCCL built in")

    monkeypatch.setattr(module, "pick_device", lambda *_: CUDA)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(TrainingError, match="^torch .* has no NCCL, .*: install a") as raised:
            join("cuda")
        assert raised.value.quiet == bool(local_rank)  # one line a machine
        assert "has no NCCL" in (tmp_path / "error.json").read_text()


def test_gpus_that_nccl_cannot_connect(monkeypatch):
    def all_reduce(tensor):
        raise dist.DistBackendError(NCCL)

    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    two = SimpleNamespace(world=2, device=CUDA, all_reduce=all_reduce)
    told = "^NCCL cannot connect the GPUs of 2 ranks: Duplicate GPU detected : .*: start one rank"
    with pytest.raises(TrainingError, match=told):
        exchange_once(two)
    exchange_once(SimpleNamespace(world=2, device=torch.device("cpu"), all_reduce=all_reduce))
