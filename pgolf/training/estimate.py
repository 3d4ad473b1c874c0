"""What a run will take, said before it takes it: memory, time, and the settings that shorten them.

Memory of a rank, in bytes, is about

    state + passing + max(tokens x kept, state) + 0.77 GB
    state + passing + tokens x kept + 4 (state + published) + 0.77 GB    with CUDA graphs

state: weights, Muon's momentum of matrices and AdamW's two of the rest, all in the parameter's
dtype, and an fp32 copy for each average; the second one is the checkpoint that is being written.
Graphs keep what a pass needs for good, in a pool of their own, and beside it are four states while
a replayed step is compared with two eager ones; published: one weight of `passing`.
passing: of a matrix the published weight, its gradient, and that in the buffer that ranks
exchange, all in the compute dtype; of the rest a gradient. tokens: those of one pass. kept, a
token: layers x (8 dim + 7 kv + 1.2 hidden) + 10 dim activations of the compute dtype, and logits
with their gradient in fp32. 0.77 GB are torch and the libraries. kv = dim kv_heads / heads. The
factors fit what the operators keep; plain torch (ops=reference) keeps a third more, and of
several ranks each holds less.
"""

from pathlib import Path

import torch

from pgolf.config import Config
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.optim.groups import kind_of
from pgolf.optim.schedule import Clock, Schedule
from pgolf.progress import format_seconds
from pgolf.scoring.windows import windows
from pgolf.training.passes import CPU_TOKENS

LIBRARIES = 770e6
FORWARD = 1 / 3  # of the time of forward and backward
SLOW = 30.0  # seconds of scoring above which what shortens it is said


def memory(model: GPT, config: Config, tokens: int, graphs: bool = False) -> float:
    """Bytes that training takes at most on a rank, about; see the module's formulas."""
    m, side = config.model, config.optim.side_proj_optimizer
    copies = sum(a in config.average.averaging for a in ("ema", "swa"))
    state = passing = published = 0
    for name, p in model.named_parameters():
        matrix = kind_of(name, side) == "matrix"
        state += p.numel() * (p.element_size() * (2 if matrix else 3) + 4 * copies)
        published += p.numel() * model.compute_dtype.itemsize * matrix
        passing += p.numel() * (3 * model.compute_dtype.itemsize if matrix else p.element_size())
    kv = m.dim // m.heads * m.kv_heads
    kept = m.layers * (8 * m.dim + 7 * kv + 1.2 * m.mlp_hidden) + 10 * m.dim
    activations = tokens * (kept * model.compute_dtype.itemsize + 8 * m.vocab_size)
    beside = activations + 4 * (state + published) if graphs else max(activations, state)
    return state + passing + beside + LIBRARIES


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free for a run; None where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def memory_line(
    model: GPT, config: Config, tokens: int, free: float | None = None, graphs: bool = False
) -> str:
    """The memory of a run, that there is less where there is, and what a smaller pass takes.

    Args:
        free: bytes, None if that is not known.
        graphs: whether steps are replayed.
    """
    size, length = memory(model, config, tokens, graphs), config.data.seq_len
    line = f"about {size / 1e9:.1f} GB at its peak"
    if free is not None and size > free:
        line += f", MORE THAN THE {free / 1e9:.1f} GB THAT ARE FREE"
    fewer = max(CPU_TOKENS // length, 1) * length
    less = memory(model, config, fewer, graphs)
    if less < 0.7 * size:
        line += f"; micro_tokens={fewer} takes {less / 1e9:.1f} GB"
    return line


def time_line(config: Config, clock: Clock, targets: int, step: float, token: float) -> str:
    """The time of training and scoring, and the settings that shorten it.

    Args:
        clock: what is spent already, by a run that is resumed.
        targets: validation tokens that are scored.
        step: seconds of a step.
        token: seconds of a token of a pass, forward and backward, with all ranks at work.

    Raises:
        ConfigError: there is no time for a single step.
    """
    schedule, e = Schedule(config), config.eval
    if not clock.step and 0 < schedule.max_seconds < step:
        s = config.schedule
        reserve = f" less reserve_s={s.reserve_s:g}" * bool(s.reserve_s)
        raise ConfigError(
            f"max_seconds={s.max_seconds:g}{reserve} is too short: a step takes {step:.2g} s here; "
            "allow more time, or lower batch_tokens"
        )
    steps = [float(schedule.max_steps - clock.step)] if schedule.max_steps else []
    if schedule.max_seconds:
        steps.append((schedule.max_seconds - clock.seconds) // step)
    count = max(min(steps), 0.0)
    training = count * step

    def scoring(stride: int) -> float:
        length, starts, _ = windows(targets, config.data.seq_len, stride)
        return len(starts) * length * token * FORWARD

    validation = scoring(config.data.seq_len) * (1 + (count // e.val_every if e.val_every else 0))
    final = scoring(e.stride) * (1 + e.score_live)
    line = (
        f"about {format_seconds(training)} of training ({count:,.0f} steps of "
        f"{step:.2f} s), {format_seconds(validation)} of validation, {format_seconds(final)} of "
        "scoring"
    )
    if validation + final > max(SLOW, 0.5 * training):
        wide = config.data.seq_len // 2 or 1
        shorter = [f"stride={wide} ({format_seconds(scoring(wide))})"] if wide > e.stride else []
        shorter += ["score_live=false (half)"] if e.score_live else []
        shorter += ["val_every=0"] if e.val_every and validation > final else []
        line += f"; shorter scoring: {', '.join([*shorter, 'val_tokens=N'])}, or quick=true for all"
    if training > 3600:
        line += "; shorter training: max_tokens=N or max_seconds=N"
    return line


def quick_values(config: Config) -> dict[str, object]:
    """The settings of quick=true: how little validates, calibrates and scores a run usefully."""
    return {
        "val_tokens": 65_536,
        "stride": max(config.data.seq_len // 2, config.eval.stride),
        "val_every": 0,
        "score_live": False,
        "calibration_sequences": min(16, config.quant.calibration_sequences),
    }
