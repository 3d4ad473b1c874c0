"""What is stored for each tensor: fp16 values, or which integer grid with which clip.

The order of the rules is that of the published scripts, with overrides in front:

    1. not a weight matrix (scales, gates, gains, skips)   fp16
    2. the first pattern of `bits_overrides` that matches  its bits
    3. at most `small_numel` elements                      fp16
    4. the group (attn, mlp, tok, bigram, ve)              its bits
    5. any other matrix (the projections of 4's tables)    8 bits

Late QAT asks for the same plan, so with grid=rows training sees the grid that is exported. With
grid=uniform it sees one step a matrix, before Hessians, moments and a budget move the steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pgolf import roles
from pgolf.config import QuantConfig
from pgolf.errors import ConfigError

# Text of the config -> bits, and the number that codes are multiples of.
GRIDS = {"4": (4, 1), "5": (5, 1), "6": (6, 1), "7": (7, 1), "8": (8, 1), "8/4": (8, 4)}


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is stored.

    Attributes:
        kind: 'float16' or 'int'.
        reason: the rule that decided, for people.
        bits: bits a code; 16 for float16.
        multiple: codes are multiples of it.
        clip: 'max' (the row's maximum), 'quantile' (the one percentile), 'search_row' and
            'search_matrix' (the candidate with the least error), or 'uniform' (none: one step for
            the matrix).
        percentiles: candidates for the clip; 1 is the row's maximum.
        floor: least clip.
        full_range: use -2^(bits-1) too.
        widths: more candidates, in standard deviations of the row.
        on_grid: steps are those of `step_grid`.
        relative_step: of 'uniform', in rms of the matrix.
    """

    kind: str
    reason: str
    bits: int = 16
    multiple: int = 1
    clip: str = "max"
    percentiles: tuple[float, ...] = (1.0,)
    floor: float = 0.0
    full_range: bool = False
    widths: tuple[float, ...] = ()
    on_grid: bool = False
    relative_step: float = 0.0

    @property
    def clips(self) -> int:
        """How many there are to choose from."""
        return len(self.percentiles) + len(self.widths)

    def grid(self) -> dict[str, float | int | bool]:
        """The keyword arguments of `fake_quant` that make the exported grid."""
        return {"floor": self.floor, "multiple": self.multiple, "full_range": self.full_range}


def plan_tensors(
    config: QuantConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorPlan]:
    """The plan of every tensor, in the order of `shapes`.

    Raises:
        ConfigError: a pattern of `bits_overrides` matches no matrix, or a list is malformed.
    """
    matrices = [n for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2]
    chosen: dict[str, tuple[str, str]] = {}
    for pattern, bits in _overrides(config):
        matched = [n for n in matrices if fnmatchcase(n, pattern)]
        if not matched:
            raise ConfigError(
                f"bits_overrides: {pattern!r} matches no matrix; an example is {matrices[:1]}"
            )
        for name in matched:
            chosen.setdefault(name, (bits, f"override {pattern}"))

    plans = {}
    for name, shape in shapes.items():
        if name not in matrices:
            plans[name] = TensorPlan("float16", "not a weight matrix")
        elif name in chosen:
            plans[name] = _grid(config, *chosen[name])
        elif shape[0] * shape[1] <= config.small_numel:
            plans[name] = TensorPlan("float16", f"at most {config.small_numel} elements")
        else:
            plans[name] = _grid(config, *_group_bits(config, name))
    return plans


def _group_bits(config: QuantConfig, name: str) -> tuple[str, str]:
    group = roles.group(name)
    if roles.is_side_projection(name):
        return "8", "other matrix"
    bits = {
        "attn": config.attn_bits,
        "mlp": config.mlp_bits,
        "tok": config.tok_bits,
        "bigram": config.bigram_bits,
        "ve": config.ve_bits,
    }
    return (bits[group], group) if group in bits else ("8", "other matrix")


def _grid(config: QuantConfig, text: str, reason: str) -> TensorPlan:
    """The plan for bits `text`: 8 bits take one fixed percentile, other grids the search."""
    if text == "16":
        return TensorPlan("float16", reason)
    bits, multiple = GRIDS[text]
    if config.grid == "uniform":
        # Codes are those of 8 bits; the bits that were asked for say how fine the step is.
        levels = (2 ** (bits - 1) - 1) // multiple
        step = config.width / levels
        return TensorPlan("int", reason, 8, clip="uniform", on_grid=True, relative_step=step)
    floor, widths = config.min_step, ()
    # int8 codes never use -128: the published full range is that of their searched grids.
    full_range = config.full_range and bits < 8
    # The published steps, with their floor or one percentile a matrix, stay as they are.
    on_grid = config.quantizer == "gptq" and floor == 0 and config.clip_search != "matrix"
    if text in _max_clip_bits(config):
        clip, candidates, floor = "max", (1.0,), 0.0
    elif text == "8":
        clip, candidates = "quantile", (config.int8_percentile,)
    elif config.clip_search == "max":
        clip, candidates = "max", (1.0,)
    else:
        clip, candidates = f"search_{config.clip_search}", _percentiles(config)
        widths = _widths(config)
    return TensorPlan(
        "int", reason, bits, multiple, clip, candidates, floor, full_range, widths, on_grid
    )


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _overrides(config: QuantConfig) -> list[tuple[str, str]]:
    pairs = []
    for item in _items(config.bits_overrides):
        pattern, equals, bits = item.rpartition("=")
        if not equals or not pattern or (bits != "16" and bits not in GRIDS):
            raise ConfigError(
                f"bits_overrides: {item!r} is not PATTERN=BITS with bits {', '.join(GRIDS)} or 16"
            )
        pairs.append((pattern, bits))
    return pairs


def _max_clip_bits(config: QuantConfig) -> list[str]:
    items = _items(config.max_clip_bits)
    for item in items:
        if item not in GRIDS:
            raise ConfigError(f"max_clip_bits: {item!r} is not one of {', '.join(GRIDS)}")
    return items


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list, or none if one of its items is no number."""
    try:
        return tuple(float(item) for item in _items(text))
    except ValueError:
        return ()


def _widths(config: QuantConfig) -> tuple[float, ...]:
    if config.quantizer != "gptq" or not config.clip_widths:
        return ()
    values = _numbers(config.clip_widths)
    if not values or not all(0 < value < math.inf for value in values):
        raise ConfigError(
            f"clip_widths={config.clip_widths}: expected numbers above 0, as 3.5,4,5"
        )
    return values


def _percentiles(config: QuantConfig) -> tuple[float, ...]:
    values = _numbers(config.clip_percentiles)
    if not values or not all(0 < value <= 1 for value in values):
        raise ConfigError(
            f"clip_percentiles={config.clip_percentiles}: expected numbers above 0 and up to 1, "
            "as 0.999,0.9999,1"
        )
    return values
