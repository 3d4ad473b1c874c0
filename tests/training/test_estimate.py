"""What a run says it will take, before it takes it."""

import pytest
import torch

from pgolf import cli
from pgolf.config import Config, with_overrides
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.optim.schedule import Clock
from pgolf.recipes import get
from pgolf.training import run
from pgolf.training.estimate import memory, memory_line, time_line
from pgolf.training.passes import pass_limit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model(config: Config, dtype: torch.dtype) -> GPT:
    with torch.device("meta"):
        return GPT(config.model, dtype, max_length=config.data.seq_len)


def test_memory_is_what_was_counted() -> None:
    """pr1473's forward and backward of 48 x 2048 tokens keep 16.9 GB: README.md."""
    config = get("pr1473").config()
    size = memory(model(config, torch.bfloat16), config, 98_304)
    assert size == pytest.approx(18.0e9, rel=0.1)
    assert "micro_tokens=8192 takes" in memory_line(model(config, torch.bfloat16), config, 98_304)
    assert ";" not in memory_line(model(config, torch.bfloat16), config, 8192)


def test_graphs_keep_what_a_pass_needs() -> None:
    """Their pool is not free for the copies of the state that are compared, nor for checkpoints."""
    config = get("pr1473").config()
    meta = model(config, torch.bfloat16)
    more = memory(meta, config, 98_304, graphs=True) - memory(meta, config, 98_304)
    matrices = sum(p.numel() for p in meta.parameters() if p.ndim == 2)
    assert 4 * 8 * matrices < more < 4 * 20 * matrices
    state = memory(meta, config, 0) - memory(meta, config, 0, graphs=True)
    assert state < 0  # with no token in a pass as well
    assert memory_line(meta, config, 98_304, graphs=True) != memory_line(meta, config, 98_304)


def test_memory_that_is_not_there_is_said() -> None:
    config = get("pr1473").config()
    meta = model(config, torch.bfloat16)
    line = memory_line(meta, config, 98_304, free=8e9)
    assert "MORE THAN THE 8.0 GB THAT ARE FREE; micro_tokens=8192 takes" in line
    assert "MORE" not in memory_line(meta, config, 98_304, free=30e9)


def test_a_pass_on_a_cpu_is_no_larger_than_needed() -> None:
    config = with_overrides(get("demo").config(), {"batch_tokens": "65536"})
    assert pass_limit(config, CPU) == 8192 and pass_limit(config, CUDA) == 98_304
    assert pass_limit(with_overrides(config, {"micro_tokens": 4096}), CPU) == 4096
    # gradients that are summed in bf16 would not be the same
    assert pass_limit(get("pr1473").config(), CPU) == 98_304


def test_time_names_what_shortens_it() -> None:
    """10 steps of 2 s; 16,384 targets in windows of 256, at 3 ms a token of a pass."""
    config = with_overrides(
        get("demo").config(), {"max_tokens": 20480, "val_every": 0, "stride": 64}
    )
    told = time_line(config, Clock(), 16_384, 2.0, 0.003)
    assert "about 20s of training (10 steps of 2.00 s), 16s of validation, 2m10s of" in told
    assert "stride=128 (33s), score_live=false (half), val_tokens=N, or quick=true" in told
    rest = time_line(config, Clock(5, 10240, 10.0), 16_384, 2.0, 0.00003)
    assert "about 10s of training" in rest and "shorter" not in rest
    limited = with_overrides(config, {"max_seconds": 7200, "max_tokens": 0})
    assert "max_tokens=N or max_seconds=N" in time_line(limited, Clock(), 16_384, 2.0, 0.003)


def test_a_budget_without_a_step_is_refused() -> None:
    config = with_overrides(get("demo").config(), {"max_seconds": 3, "reserve_s": 1.5})
    told = "max_seconds=3 less reserve_s=1.5 is too short: a step takes 2 s here; allow more time"
    with pytest.raises(ConfigError, match=told):
        time_line(config, Clock(), 16_384, 2.0, 0.003)
    assert "0 steps" in time_line(config, Clock(1, 2048, 1.2), 16_384, 2.0, 0.003)  # it goes on
    assert "(1 steps" in time_line(config, Clock(), 16_384, 1.5, 0.003)


def test_quick_gives_way_to_what_is_given(monkeypatch) -> None:
    configs = []
    monkeypatch.setattr(run, "run", lambda config, *_: configs.append(config) or 0)
    assert cli.main(["train", "demo", "quick=true", "eval.val_tokens=999"]) == 0
    assert cli.main(["train", "demo"]) == 0
    e = configs[0].eval
    assert (e.val_tokens, e.stride, e.val_every, e.score_live) == (999, 128, 0, False)
    assert configs[0].quant.calibration_sequences == 16 and configs[1] == get("demo").config()
    assert cli.main(["train", "demo", "quick=maybe"]) == 2
