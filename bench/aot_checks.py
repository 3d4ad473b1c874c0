"""What has to hold for a compiled kernel, and how two tables of figures differ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SHARED_LIMIT = 232448  # bytes that a block can have on sm_90
Row = Mapping[str, Any]  # one compiled kernel, as bench/results/aot.json holds it


@dataclass(frozen=True)
class Required:
    """Instructions that a kernel is built around."""

    sass: tuple[str, ...] = ()
    bf16: tuple[str, ...] = ()  # more of them where the case is bf16
    ptx: tuple[str, ...] = ()
    never_ptx: tuple[str, ...] = ()


VECTORS = Required(("LDG.128", "STG.128"))
TMA_GEMM = Required(bf16=("HGMMA", "UTMALDG", "UTMASTG"))
POINTER_GEMM = Required(bf16=("HGMMA", "LDGSTS"))
# `/` in Triton is div.full.f32, which is off by up to 2 units in the last place.
QUANTISER = Required(VECTORS.sass, ptx=("div.rn.f32",), never_ptx=("div.full.f32",))
# A kernel that is not in here is an error: a new one has to say what it is built around.
REQUIRED = {
    "xsa_forward_kernel": VECTORS,
    "xsa_backward_kernel": VECTORS,
    "leaky_relu2_up_tma": TMA_GEMM,
    "leaky_relu2_dgrad_tma": TMA_GEMM,
    "leaky_relu2_up": POINTER_GEMM,
    "leaky_relu2_dgrad": POINTER_GEMM,
    "newton_schulz_norms": Required(("LDG.128",)),
    "newton_schulz_scale": VECTORS,
    "newton_schulz_product": POINTER_GEMM,
    "fake_quant_forward_kernel": QUANTISER,
    "fake_quant_backward_kernel": QUANTISER,
}


def hard_limits(name: str, row: Row) -> list[str]:
    """What is wrong with a compiled kernel, whatever the versions are; one line each."""
    found = []
    instructions, ptx = row["instructions"], row["ptx"]
    spills = instructions.get("LDL", 0) + instructions.get("STL", 0)
    if spills or row["local"]:
        found.append(f"spills: {spills} local loads and stores, {row['local']} bytes a thread")
    if row["shared"] > SHARED_LIMIT:
        found.append(f"{row['shared']} bytes of shared memory, a block has {SHARED_LIMIT}")
    required = REQUIRED.get(row["kernel"])
    if required is None:
        return [f"{name}: REQUIRED in bench/aot_checks.py does not name this kernel"]
    wanted = required.sass + (required.bf16 if row["dtype"] == "bf16" else ())
    found += [f"no {opcode} in the SASS" for opcode in wanted if opcode not in instructions]
    found += [f"no {opcode} in the PTX" for opcode in required.ptx if opcode not in ptx]
    found += [f"{opcode} in the PTX" for opcode in required.never_ptx if opcode in ptx]
    return [f"{name}: {text}" for text in found]


def unreached(reached: Iterable[tuple[str, int]], known: Mapping[str, int]) -> list[str]:
    """Rows of configs.json (kernel -> number of rows) that no launch has used; one line each."""
    reached = set(reached)
    return [
        f"{kernel}: row {i} of configs.json is reached by no case of bench/aot_cases.py"
        for kernel, rows in known.items()
        for i in range(rows)
        if (kernel, i) not in reached
    ]


def differences(measured: Mapping[str, Row], recorded: Mapping[str, Row]) -> list[str]:
    """Every figure that is not the recorded one; one line each."""
    found = []
    for name in sorted(measured.keys() | recorded.keys()):
        if name not in measured:
            found.append(f"{name}: in the table, but not compiled any more")
        elif name not in recorded:
            found.append(f"{name}: not in the table")
        else:
            old, new = _flat(recorded[name]), _flat(measured[name])
            found += [
                f"{name}: {figure} was {old.get(figure, 0)}, is {new.get(figure, 0)}"
                for figure in sorted(old.keys() | new.keys())
                if old.get(figure, 0) != new.get(figure, 0)
            ]
    return found


def _flat(row: Row) -> dict[str, Any]:
    """{'instructions': {'LDG': 4}} -> {'instructions LDG': 4}."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {inner}": n for inner, n in value.items()}
        else:
            flat[name] = value
    return flat
