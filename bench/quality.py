"""`python -m bench quality`: what each way to quantise a run's weights costs in bits per byte."""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from bench import schema
from pgolf.artifact.pack import encode
from pgolf.config import Config, QuantConfig, with_overrides
from pgolf.data.shards import load_validation
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import pick_device, pick_dtype
from pgolf.errors import PgolfError
from pgolf.model import GPT
from pgolf.quant.budget import Steps, fill_budget
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import Calibration
from pgolf.quant.quantize import QuantizedModel, quantize
from pgolf.quant.safeguard import expected_to_add
from pgolf.ranks import Ranks
from pgolf.scoring.bpb import ByteTable
from pgolf.scoring.job import ScoreJob
from pgolf.scoring.windows import evaluate
from pgolf.training.export import calibrate, metadata
from pgolf.training.repack import load_weights, settings
from pgolf.training.run_data import find_dataset
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import Session

DESCRIPTION = """\
Quantise the weights of a run in every way that pgolf knows, write each to a file, decode and score
it in a fresh process. For each width, the grids with so many bits a weight come first, then the
uniform grid, fitted to the bytes that GPTQ took.
"""
EPILOG = """\
examples:
  python -m bench quality runs/demo-seed1337
  python -m bench quality runs/demo-seed1337 --bits 5 6 --stride 256 --json quality.jsonl
"""
LITE = {
    "quantizer": "lite", "grid": "rows", "fit_to_budget": False, "min_step": 0.0,
    "max_clip_bits": "",
}  # fmt: skip
GPTQ = LITE | {"quantizer": "gptq", "clip_search": "row"}
METHODS = {
    "round to nearest": LITE | {"clip_search": "max"},
    "lite as published, with its floor": LITE | {"clip_search": "matrix", "min_step": 1.0},
    "lite, a clip a matrix": LITE | {"clip_search": "matrix"},
    "lite, a clip a row": LITE | {"clip_search": "row"},
    "gptq, self-generated": GPTQ | {"calibration": "self"},
    "gptq, training text": GPTQ | {"calibration": "train"},
}
UNIFORM = {
    "uniform, same bytes": {"rate_weight": 0.0},
    "uniform by rate, same bytes": {"rate_weight": 0.1},
}


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench quality", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, help="run folder with a checkpoint")
    add("--bits", type=int, nargs="+", default=[6, 5, 4], choices=range(4, 9), metavar="BITS",
        help="widths of the block matrices (6 5 4); tables keep those of the run")
    add("--stride", type=int, default=64, help="targets a window scores (64)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    args = parser.parse_args(argv)
    try:
        return _run(args, shlex.join(["python", "-m", "bench", "quality", *argv]))
    except PgolfError as e:
        print(f"python -m bench quality: {e}", file=sys.stderr)
        return e.exit_code


def _run(args: argparse.Namespace, command: str) -> int:
    trained, config = settings(args.run, {"codec": "rans"})
    if not 1 <= args.stride <= config.data.seq_len:
        raise PgolfError(f"--stride {args.stride}: expected 1 to {config.data.seq_len}")
    bench = _Bench(args.run, trained, config, pick_device(args.device), args.stride)
    setting = schema.setting(bench.device, command, "default")
    live = bench.live()
    print(f"{bench.description}: {live:.5f} bits per byte before quantisation, "
          f"stride {args.stride}\n"
          f"{'':36} {'bits':>4} {'bytes':>10} {'BPB':>8} {'lost':>8} {'expected':>9}")  # fmt: skip
    lines = []
    for bits in args.bits:
        for method in (*METHODS, *UNIFORM):
            if method in METHODS:
                model = bench.rows(bits, METHODS[method])
            else:  # METHODS ends with GPTQ, whose bytes are the budget
                budget = next(x.bytes_model for x in reversed(lines) if x.method in METHODS)
                model = bench.uniform(bits, UNIFORM[method], budget)
            size, bpb = bench.score(model)
            losses = bench.expected(model)
            line = schema.Quality(
                **asdict(setting), run=str(args.run), method=method, bits=bits, bytes_model=size,
                bpb_live=live, bpb=bpb, expected_loss=losses, stride=args.stride,
            )  # fmt: skip
            lines.append(line)
            print(f"{method:36} {bits:>4} {size:>10,} {bpb:>8.5f} {bpb - live:>+8.5f} "
                  f"{losses:>9.6f}", flush=True)  # fmt: skip
    print("bytes: the artifact with the entropy coder; expected: to add to the loss, nats a token")
    if args.json:
        schema.write_jsonl(args.json, lines)
    return 0


class _Bench:
    """A run's weights, the statistics of both calibrations, and how to score a model."""

    def __init__(
        self, run: Path, trained: Config, config: Config, device: torch.device, stride: int
    ):
        self.config, self.device, self.stride = config, device, stride
        self.dataset = find_dataset(run, config.data)
        self.folder = RunFolder(run, writes=False)
        self.model, self.description = load_weights(run, trained, device)
        self.state = self.model.export_state()
        self.dtype = pick_dtype("auto", device)[0]
        self.statistics = {name: self._collect(name) for name in ("train", "self")}
        damping = config.quant.damping
        self.factors = {n: Factors(s.hessians, damping) for n, s in self.statistics.items()}

    def _collect(self, calibration: str) -> Calibration:
        config = with_overrides(self.config, GPTQ | {"calibration": calibration})
        session = Session(config, Ranks(0, 1, self.device), self.dataset, self.folder)
        return calibrate(session, self.model)

    def _quant(self, bits: int, overrides: Mapping[str, object]) -> QuantConfig:
        widths = {"attn_bits": str(bits), "mlp_bits": str(bits)}
        return with_overrides(self.config, widths | dict(overrides)).quant

    def rows(self, bits: int, overrides: Mapping[str, object]) -> QuantizedModel:
        """The model on grids per row."""
        quant = self._quant(bits, overrides)
        return quantize(
            self.state, quant, factors=self.factors[quant.calibration],
            held_out=self.statistics[quant.calibration].held_out,
        )  # fmt: skip

    def uniform(self, bits: int, overrides: Mapping[str, object], size: int) -> QuantizedModel:
        """The model on a uniform grid, in at most `size` bytes."""
        quant = self._quant(bits, {"grid": "uniform", "quantizer": "gptq"} | dict(overrides))
        steps = Steps(self.state, quant, self.statistics["train"], self.factors["train"])
        return fill_budget(steps, size, lambda m: len(self._encode(m)))[0]

    def _encode(self, model: QuantizedModel) -> bytes:
        meta = metadata(self.config, self.dataset)
        return encode(model, meta, self.config.artifact, progress=False).data

    def expected(self, model: QuantizedModel) -> float:
        """What it is expected to add to the loss, by training text held out, in nats a token."""
        judge = self.statistics["train"].held_out
        return sum(
            expected_to_add(self.state[n].float(), model.tensors[n], h, judge.moments[n])
            for n, h in judge.hessians.items()
        )

    def live(self) -> float:
        """Bits per byte of the weights as they are."""
        tokens = load_validation(
            self.dataset.folder, self.config.model.vocab_size, self.config.data.seq_len,
            self.config.eval.val_tokens,
        )  # fmt: skip
        table = ByteTable(load_tokenizer(self.dataset.tokenizer_path), self.config.model.vocab_size)
        model = GPT(self.config.model, self.dtype, self.config.data.seq_len)
        model.load_state_dict(self.state)
        return evaluate(
            model.to(self.device), tokens, table, self.config.data.seq_len, self.stride,
            self.config.eval.eval_tokens, progress="scoring live",
        ).bpb  # fmt: skip

    def score(self, model: QuantizedModel) -> tuple[int, float]:
        """Bytes of the file, and its bits per byte by a fresh process."""
        data = self._encode(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "artifact"
            path.write_bytes(data)
            settings = dataclasses.replace(self.config.eval, stride=self.stride)
            job = ScoreJob.of(
                path, self.dataset, settings, Ranks(0, 1, self.device), self.dtype
            )
            sums = job.ask().sums
        return len(data), sums.bpb
