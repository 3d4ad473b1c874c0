"""Checks an artifact fully and lists what it holds."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.artifact.container import VERSION, Artifact, read_artifact
from pgolf.artifact.header import Entry
from pgolf.artifact.sizes import byte_shares


@dataclass(frozen=True)
class VerifyReport:
    """A valid artifact, and the bytes of its file by group and by tensor, see `sizes`."""

    path: Path
    artifact: Artifact
    group_bytes: dict[str, int]
    tensor_bytes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values; the keys are the same for every file."""
        a = self.artifact
        return {
            "path": str(self.path),
            "format": VERSION,
            "codec": a.codec,
            "packing": a.packing,
            "file_bytes": a.file_bytes,
            "decoded_bytes": a.decoded_bytes,
            "weights": sum(math.prod(e.shape) for e in a.layout.header.tensors),
            "bytes_by_group": self.group_bytes,
            "meta": a.meta,
            "tensors": [self._row(e) for e in a.layout.header.tensors],
        }

    def _row(self, entry: Entry) -> dict[str, Any]:
        integers, count = entry.bits != 16, math.prod(entry.shape)
        vectors = self.artifact.layout.header.columns
        own = None if entry.columns is None else vectors[entry.columns]
        size = self.tensor_bytes[entry.name]
        return {
            "name": entry.name,
            "stored": f"int{entry.bits}" if integers else "float16",
            "shape": list(entry.shape),
            "steps": ("halves" if entry.steps is None else "indices") if integers else None,
            "columns": None if own is None else "halves" if own.base is None else "indices",
            "columns_index": entry.columns,
            "file_bytes": size,
            "bits_per_weight": 8 * size / count if count else None,
        }

    def to_text(self) -> str:
        """A table of the tensors, the sizes and the meta data."""
        report = self.to_dict()
        rows = report["tensors"]
        width = max([4, *(len(row["name"]) for row in rows)])
        lines = [
            f"{'name':{width}}  {'stored as':9}  {'steps':7}  {'columns':>11}  "
            f"{'bytes':>10}  {'bits/weight':>11}  shape"
        ]
        for row in rows:
            columns = f"{row['columns']} {row['columns_index']}" if row["columns"] else "-"
            per_weight = "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
            lines.append(
                f"{row['name']:{width}}  {row['stored']:9}  {row['steps'] or '-':7}  "
                f"{columns:>11}  {row['file_bytes']:10,}  {per_weight:>11}  "
                f"{' x '.join(map(str, row['shape'])) or 'scalar'}"
            )
        groups = ", ".join(f"{name} {size:,}" for name, size in report["bytes_by_group"].items())
        codes = "coded by rans" if report["codec"] == "rans" else f"as {report['packing']}"
        lines += [
            "",
            "Bytes are those of the file, with steps and column factors; factors that several "
            "tensors share count for the first.",
            f"bytes by group: {groups}",
            f"{len(rows)} tensors, {report['weights']:,} weights, "
            f"{report['decoded_bytes']:,} bytes decoded (codes {codes})",
            f"meta: {json.dumps(report['meta'], sort_keys=True)}",
            f"{self.path}: valid, {report['file_bytes']:,} bytes with {report['codec']}",
        ]
        return "\n".join(lines)


def verify(path: Path | str) -> VerifyReport:
    """Decode the whole file with every check.

    Raises:
        ArtifactError: it is not a valid artifact; the message says why.
    """
    artifact = read_artifact(Path(path))
    return VerifyReport(Path(path), artifact, *byte_shares(artifact))
