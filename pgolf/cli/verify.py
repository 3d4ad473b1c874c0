"""`pgolf verify`: check an artifact fully and list what it holds."""

import json
from pathlib import Path

from pgolf.artifact.location import artifact_of
from pgolf.artifact.verify import verify
from pgolf.options import Parser


def main(argv: list[str]) -> int:
    """Print the report of one artifact."""
    parser = Parser(
        prog="pgolf verify",
        description="Decode an artifact with every check, and list its tensors: how each is "
        "stored, and the bytes that it takes in the file. With the codec rans these are what the "
        "coder says; otherwise the order-0 entropy of its codes, scaled to the file.",
        epilog="example: pgolf verify runs/demo-seed1337 --json | jq .bytes_by_group",
    )
    parser.add_argument("artifact", type=Path, help="artifact file, or the folder of its run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    report = verify(artifact_of(args.artifact))
    print(json.dumps(report.to_dict(), indent=1) if args.json else report.to_text())
    return 0
