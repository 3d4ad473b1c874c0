"""`pgolf import`: make a run folder of weights that a public script trained."""

from pathlib import Path

from pgolf.config import parse_overrides
from pgolf.device import pick_device
from pgolf.options import SETTINGS, Parser
from pgolf.recipes import get
from pgolf.submission.script import build_script
from pgolf.training.import_weights import import_run


def main(argv: list[str]) -> int:
    """Write the run folder, pack the weights, print how to score them."""
    parser = Parser(
        prog="pgolf import",
        description="Make a run folder of weights that a public script of the contest trained: "
        "final_model.pt with a tensor per layer or with banks, its quantised model (zlib, lzma or "
        "zstd), or a safetensors file. It is packed with the recipe's settings; then eval, verify, "
        "sample and pack work on it. Nothing was trained: there is no result.json.",
        epilog="examples: pgolf import final_model.pt --recipe pr1473 --out runs/theirs; "
        "pgolf import final_model.pt --recipe pr478 --out runs/theirs backout=true",
    )
    parser.add_argument("file", type=Path, help="file of weights")
    parser.add_argument("--recipe", required=True, help="recipe whose model it is")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("overrides", nargs="*", metavar=SETTINGS, help="settings to change")
    args = parser.parse_intermixed_args(argv)
    overrides = parse_overrides(args.overrides)
    config = get(args.recipe).config({**overrides, "out": str(args.out)})
    folder, packed = import_run(args.file, config, pick_device(args.device), build_script)
    print(
        f"{folder.artifact}: model {packed.report.total:,} + code {packed.bytes_code:,} = "
        f"{packed.total:,} bytes\nscore it with `pgolf eval {folder.artifact}`"
    )
    return 0
