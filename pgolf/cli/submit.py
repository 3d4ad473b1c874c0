"""`pgolf submit`: write the record folder of finished runs."""

import datetime
import re
from pathlib import Path

from pgolf.config import from_dict
from pgolf.options import Parser
from pgolf.recipes import get, run_name, title
from pgolf.submission.record import About, write_record
from pgolf.submission.texts import code_parts, of_seeds
from pgolf.training.run_folder import read_config


def main(argv: list[str]) -> int:
    """Write the folder and print what is in it."""
    parser = Parser(
        prog="pgolf submit",
        description="Write the contest's record folder: one self-contained script with all code, "
        "the artifact of the best run, README, submission.json and a log for each seed. The script "
        "scores the artifact in an empty folder before anything is written.",
        epilog="example: pgolf submit runs/pr1473-seed* --author 'A. Name' --github-id aname",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders that differ in their seed"
    )
    parser.add_argument("--data", default="", help="the runs' shards, if they were moved")
    parser.add_argument("--out", type=Path, help="folder to write; default: DATE_NAME")
    parser.add_argument("--author", default="", help="your name, for submission.json")
    parser.add_argument("--github-id", default="", help="your name on GitHub, for submission.json")
    parser.add_argument("--name", help="of the record; default: the recipe's, marked if changed")
    parser.add_argument("--blurb", help="one sentence; default: the recipe's title, or its changes")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="today")
    parser.add_argument("--track", help="default: track_10min_16mb for a contest recipe")
    parser.add_argument("--hardware", default="", help="default: the device of the runs")
    args = parser.parse_args(argv)
    config = from_dict(read_config(args.runs[0]))
    recipe = get(config.recipe)
    about = About(
        author=args.author,
        github_id=args.github_id,
        name=args.name or run_name(config),
        blurb=args.blurb or title(config),
        date=args.date,
        track=args.track or ("track_10min_16mb" if recipe.contest else "track_non_record_16mb"),
        hardware=args.hardware,
    )
    out = args.out or Path(f"{about.date}_{re.sub(r'[^A-Za-z0-9]+', '-', about.name).strip('-')}")
    record = write_record(args.runs, out, about, args.data)
    values = record.values
    print(
        f"{out}: val_bpb {values['val_bpb']:.8f}{of_seeds(values)}, "
        f"model {values['bytes_model']:,} + code {values['bytes_code']:,} = "
        f"{values['bytes_total']:,} bytes"
    )
    print(f"code by part: {code_parts(record.parts)}")
    if record.note:
        print(f"the script's score: {record.note}")
    for name in ("author", "github_id"):
        if not values[name]:
            print(f"{name} is empty: fill it in in {out / 'submission.json'}")
    return 0
