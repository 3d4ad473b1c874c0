"""`pgolf verify ARTIFACT`: check a file fully and list what it holds."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf.artifact.container import Artifact, Entry, read_artifact


@dataclass(frozen=True)
class VerifyReport:
    """A valid artifact, and the bytes of its tensors before compression (codes and steps)."""

    path: Path
    artifact: Artifact
    tensor_bytes: dict[str, int]

    def to_text(self) -> str:
        """A table of the tensors, the sizes and the meta data."""
        a = self.artifact
        width = max([4, *map(len, a.tensors)])
        lines = [f"{'name':{width}}  {'stored as':9}  {'bytes':>12}  shape"]
        for name, q in a.tensors.items():
            kind = "float16" if q.scale is None else f"int{q.bits}"
            shape = " x ".join(map(str, q.shape)) or "scalar"
            lines.append(f"{name:{width}}  {kind:9}  {self.tensor_bytes[name]:12,}  {shape}")
        weights = sum(math.prod(q.shape) for q in a.tensors.values())
        lines += [
            "",
            f"{len(a.tensors)} tensors, {weights:,} weights, {a.decoded_bytes:,} bytes decoded "
            f"(codes as {a.packing})",
            f"meta: {json.dumps(a.meta, sort_keys=True)}",
            f"{self.path}: valid, {a.file_bytes:,} bytes with {a.codec}",
        ]
        return "\n".join(lines)


def verify(path: Path | str) -> VerifyReport:
    """Decode the whole file with every check.

    Raises:
        ArtifactError: it is not a valid artifact; the message says why.
    """
    artifact = read_artifact(Path(path))
    sizes = {}
    for name, q in artifact.tensors.items():
        entry = Entry(name, q.bits, q.shape)
        sizes[name] = entry.code_bytes(artifact.packing) + 2 * entry.halves()
    return VerifyReport(Path(path), artifact, sizes)


def main(argv: Sequence[str]) -> int:
    """Print the report of one artifact; errors are for the caller to show."""
    parser = argparse.ArgumentParser(prog="pgolf verify", description=__doc__.split(": ", 1)[1])
    parser.add_argument("artifact", type=Path, help="file written by training or packing")
    print(verify(parser.parse_args(argv).artifact).to_text())
    return 0
