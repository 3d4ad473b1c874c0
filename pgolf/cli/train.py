"""`pgolf train`: a recipe, with settings changed."""

from pgolf.api import start
from pgolf.cli.seeds import train_seeds
from pgolf.config import parse_overrides
from pgolf.errors import ConfigError
from pgolf.options import SETTINGS, Parser


def main(argv: list[str]) -> int:
    """Train, pack, decode and score."""
    parser = Parser(
        prog="pgolf train",
        description="Train a recipe, quantise and pack it, decode the artifact and score it. The "
        "run folder gets config.json, metrics.jsonl, artifact, result.json and report.html.",
        epilog="`pgolf recipes` lists recipes, `pgolf recipes --keys` every key. The contest's "
        "environment names (SEED, DATA_PATH, MAX_WALLCLOCK_SECONDS, ...) work too; the command "
        "line wins. resume=true continues the run in out= with its config.json; only eval.*, "
        "log_every, checkpoint_every, profile, log and device may change. "
        "quick=true tries a recipe out: fewer validation tokens (65536), a stride of "
        "half a sequence, no validation while training, no score of the live weights, 16 sequences "
        "to calibrate; settings that you give win, and max_tokens=N shortens training. "
        "A row of metrics.jsonl has the loss and the rates of a step, tokens_per_second since the "
        "last row, wait_ms that the host waited for the GPU in between, and on a GPU memory, the "
        "most bytes of tensors so far. "
        "seeds=1,2,3 trains with each of them, in OUT-seed1 and so on, and prints mean and sample "
        "deviation of the scores; with against=SCORE or against=SCORE,SCORE,... also a t-test (of "
        "one sample, or Welch's). resume=true continues runs that were begun. "
        "example: pgolf train demo layers=6 max_tokens=2e6 out=runs/six",
    )
    parser.add_argument("recipe", help="name of a recipe, such as demo")
    parser.add_argument("overrides", nargs="*", metavar=SETTINGS, help="settings to change")
    args = parser.parse_args(argv)
    overrides = parse_overrides(args.overrides)
    if "seeds" in overrides:
        train_seeds(args.recipe, overrides)
        return 0
    if "against" in overrides:
        raise ConfigError(
            f"against={overrides['against']} needs seeds=1,2,3, to compare their scores"
        )
    start(args.recipe, overrides)
    return 0
