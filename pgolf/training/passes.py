"""The passes of a step: how many there are, how long each may be, whether they are compiled."""

import torch

from pgolf.config import Config
from pgolf.errors import ConfigError

CPU_TOKENS = 8192  # a larger pass is no faster on a CPU


def pass_limit(config: Config, device: torch.device) -> int:
    """Tokens that a pass may have at most: fewer on a CPU, where the sums stay the same.

    Tables in bf16 add up their gradients in bf16: there more passes would round more often.
    """
    d = config.data
    if device.type == "cpu" and config.model.table_dtype == "fp32":
        return min(d.micro_tokens, max(CPU_TOKENS, d.seq_len))
    return d.micro_tokens


def micro_steps(batch_tokens: int, micro_tokens: int, seq_len: int, world: int) -> int:
    """Least number of micro-steps that shares a batch out evenly in whole sequences.

    Raises:
        ConfigError: there is none.
    """
    sequences, ragged = divmod(batch_tokens, seq_len * world)
    if not ragged:
        for count in range(1, sequences + 1):
            if sequences % count == 0 and sequences // count * seq_len <= micro_tokens:
                return count
    raise ConfigError(
        f"batch_tokens={batch_tokens} cannot be split into sequences of {seq_len} over {world} "
        f"ranks with at most micro_tokens={micro_tokens} a pass: change one of them"
    )


def slice_tokens(config: Config) -> int:
    """Tokens in a row of the sequential order: a pass's, were there one rank and memory enough.

    So they are the published scripts' in a step of theirs, and the same on any number of ranks.
    """
    d = config.data
    return d.batch_tokens // micro_steps(d.batch_tokens, d.micro_tokens, d.seq_len, 1)


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the model of a run goes through torch.compile."""
    wanted = config.run.compile
    return wanted == "on" or (wanted == "auto" and device.type == "cuda")
