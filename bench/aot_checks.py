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
    found = _spills(row)
    if row["shared"] > SHARED_LIMIT:
        found.append(f"{row['shared']} bytes of shared memory, a block has {SHARED_LIMIT}")
    required = REQUIRED.get(row["kernel"])
    if required is None:
        return [f"{name}: REQUIRED in bench/aot_checks.py does not name this kernel"]
    wanted = required.sass + (required.bf16 if row["dtype"] == "bf16" else ())
    found += _lacking(wanted, row["instructions"], "SASS")
    found += _lacking(required.ptx, row["ptx"], "PTX")
    found += [f"{opcode} in the PTX" for opcode in required.never_ptx if opcode in row["ptx"]]
    return [f"{name}: {text}" for text in found]


@dataclass(frozen=True)
class RequiredCuda:
    """What instances of a CUDA kernel are built around.

    Attributes:
        sass: instructions of all instances but scalar ones; "A or B" is one of both.
        vector: place of the template's argument that says how many elements are moved at once; an
            instance where it is 1 is scalar. None: no instance is.
        ptx, never_ptx: of all instances.
    """

    sass: tuple[str, ...] = ()
    vector: int | None = None
    ptx: tuple[str, ...] = ()
    never_ptx: tuple[str, ...] = ()


def _rows(vector: int | None, *sass: str) -> RequiredCuda:
    return RequiredCuda(sass or ("LDG.128", "STG.128"), vector)


# Correctly rounded everywhere: no approximate quotient, no product with an approximate reciprocal.
APPROXIMATE = ("div.full.f32", "div.approx.f32", "rcp.approx.f32")
# 16 bytes in the wider of both dtypes, which is read or written.
CAST = RequiredCuda(("LDG.128 or STG.128",), 3, ("div.rn.f32",), APPROXIMATE)
# A kernel of csrc/cuda that is not in here is an error, too.
REQUIRED_CUDA = {
    "sum_rows_kernel": RequiredCuda(),  # eight columns of four bytes of a row at once
    "xsa_forward_rows": _rows(1),
    "xsa_backward_rows": _rows(1),
    "qk_rope_forward": _rows(1),
    "qk_rope_backward_blocks": _rows(1),
    "residual_norm_forward": _rows(1),
    "residual_norm_backward_rows": _rows(1),
    "embed_smear_forward": _rows(2, "LDG.128"),  # the wider of the table's dtype and x's
    "embed_smear_chunks": _rows(2, "LDG.128"),
    "embed_smear_rows": RequiredCuda(),  # a column a lane
    "softcap_cross_entropy_rows": _rows(1),
    "leaky_relu2_words": _rows(1),
    "leaky_relu2_backward_words": _rows(1),
    "weight_cast_rows": CAST,
    "weight_cast_backward_rows": CAST,
    # One kernel for tensors that can and that cannot be moved in vectors.
    "grad_norm_chunks": _rows(None, "LDG.128"),
    "grad_norm_finish": RequiredCuda(),
    "muon_momentum_rows": _rows(None),
    "muon_momentum_scale": _rows(None),
    "param_update_chunks": _rows(None),
}


def cuda_limits(name: str, row: Row) -> list[str]:
    """As hard_limits, for a kernel of csrc/cuda."""
    required = REQUIRED_CUDA.get(row["kernel"])
    if required is None:
        return [f"{name}: REQUIRED_CUDA in bench/aot_checks.py does not name this kernel"]
    scalar = required.vector is not None and row["arguments"][required.vector] == "1"
    found = _spills(row)
    found += _lacking(() if scalar else required.sass, row["instructions"], "SASS")
    found += _lacking(required.ptx, row["ptx"], "PTX")
    found += [f"{opcode} in the PTX" for opcode in required.never_ptx if opcode in row["ptx"]]
    return [f"{name}: {text}" for text in found]


def _spills(row: Row) -> list[str]:
    spills = row["instructions"].get("LDL", 0) + row["instructions"].get("STL", 0)
    if spills or row["local"]:
        return [f"spills: {spills} local loads and stores, {row['local']} bytes a thread"]
    return []


def _lacking(wanted: Iterable[str], there: Mapping[str, int], where: str) -> list[str]:
    return [
        f"no {opcodes} in the {where}"
        for opcodes in wanted
        if not any(opcode in there for opcode in opcodes.split(" or "))
    ]


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
