"""`pgolf data ...`: make, fetch and look at folders of shards."""

import argparse
import re
import sys

from pgolf.data.contest import MANIFEST
from pgolf.data.fetch import TRAIN_SHARDS, fetch
from pgolf.data.held_out import check_held_out
from pgolf.data.inputs import KINDS, bare_name, tally
from pgolf.data.manifest import SPLITS, Dataset
from pgolf.data.prepare import SHARD_TOKENS, VAL_FRACTION, VOCAB_SIZE, prepare
from pgolf.data.readers import FIELD, TextSource
from pgolf.data.shards import read_header
from pgolf.errors import ConfigError
from pgolf.options import Parser

_PREPARE = f"""\
Turn your own text into a folder of shards with a tokenizer and a manifest.

  pgolf data prepare --text book.txt --out data/book
  pgolf data prepare --text notes/ articles.jsonl --out data/mine --vocab-size 2048
  pgolf data prepare --text web.parquet --field content --out data/web
  zstdcat web.jsonl.zst | pgolf data prepare --text - --out data/web

JSON (lines of objects, or an array) and Parquet (pip install 'pgolf[parquet]') hold one document
per record, in the field "{FIELD}" or --field; any other file is plain UTF-8 text, one document up
to 16 KiB, else cut at blank lines about every 4 KiB. Each may be compressed by gzip. In a folder,
at any depth, files with these suffixes are read, in capitals too, with or without .gz:
{" ".join(KINDS)}
Other files and hidden ones are counted, not read. The text is not changed, but a byte order mark at
the beginning is left out. The hash of a document's text decides whether it is held out. Train on
the folder with

  pgolf train demo data=data/book
"""
_FETCH = """\
Download the contest's shards and tokenizer (needs pip install 'pgolf[data]').

  pgolf data fetch --variant sp1024 --train-shards 1     (0.3 GB, for a first try)
  pgolf data fetch --variant sp1024                      (80 shards, 16 GB)

Files that are there already are checked and kept, so the command can simply be run again.
MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder.
"""
_INFO = """\
Show what a folder of shards holds: corpus, tokenizer, tokens, bytes.

  pgolf data info data/book
  pgolf data info data/datasets/fineweb10B_sp1024
  pgolf data info shards --tokenizer tokenizer.model
"""
_VERIFY = """\
Read every shard and check its header, size, tokenizer, tokens within the vocabulary and the sha256
of the manifest, and that no training shard holds a held-out document of 16 tokens or more.

  pgolf data verify data/book
"""


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="pgolf data",
        formatter_class=raw,
        description="Make, fetch and check folders of shards.",
        epilog="`pgolf data COMMAND --help` says more, with examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser(
        "prepare", help="your own text to shards", description=_PREPARE, formatter_class=raw
    )
    p.add_argument("--text", nargs="+", required=True, metavar="PATH",
                   help="text, JSON or Parquet files, folders, or - for a pipe")  # fmt: skip
    p.add_argument("--field", metavar="NAME",
                   help=f"field of a record with its text (default: {FIELD})")  # fmt: skip
    p.add_argument("--out", required=True, metavar="DIR",
                   help="folder to write; the same corpus there is replaced")  # fmt: skip
    p.add_argument("--force", action="store_true",
                   help="replace a folder prepared from another corpus too")  # fmt: skip
    p.add_argument("--name", help="id of the corpus (default: from the first PATH)")
    p.add_argument("--license", default="unknown", help="license of the text, for the manifest")
    p.add_argument("--vocab-size", type=int, metavar="N",
                   help=f"pieces of the tokenizer to train (default: {VOCAB_SIZE})")  # fmt: skip
    p.add_argument("--tokenizer", metavar="FILE", help="use this SentencePiece model instead")
    p.add_argument("--val-fraction", type=float, default=VAL_FRACTION, metavar="X",
                   help="share of documents held out (default: %(default)s)")  # fmt: skip
    p.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N",
                   help="tokens of a shard (default: %(default)s)")  # fmt: skip

    f = commands.add_parser(
        "fetch", help="the contest's data", description=_FETCH, formatter_class=raw
    )
    f.add_argument("--variant", default="sp1024", help="such as sp1024 (default)")
    f.add_argument("--train-shards", type=int, metavar="N",
                   help=f"100 million tokens each (default: {TRAIN_SHARDS}, or all)")  # fmt: skip
    f.add_argument("--out", default="data", metavar="DIR", help="default: %(default)s")

    for name, what, text in (
        ("info", "show what a folder holds", _INFO),
        ("verify", "read and check every shard", _VERIFY),
    ):
        q = commands.add_parser(name, help=what, description=text, formatter_class=raw)
        q.add_argument("folder", metavar="DIR", help="a folder of shards")
        q.add_argument("--tokenizer", metavar="FILE", help="if it is elsewhere")
    return parser


def describe(dataset: Dataset) -> str:
    """What a data set holds, in a few lines."""
    lines = [
        f"{dataset.folder}: corpus {dataset.corpus}, sha256 {dataset.sha256[:16]}...",
        f"  tokenizer {dataset.tokenizer_path}: {dataset.vocab_size} pieces, "
        f"sha256 {dataset.tokenizer_sha256[:16]}...",
    ]
    for split, shards in zip(SPLITS, (dataset.train_shards, dataset.val_shards), strict=True):
        line = f"  {split}: {sum(map(read_header, shards)):,} tokens, shards: {len(shards)}"
        if dataset.manifest:
            numbers = dataset.manifest["splits"][split]
            line += (
                ", {documents:,} documents, {bytes:,} bytes, {bytes_per_token:.4f} bytes/token"
            ).format(**numbers)
        lines.append(line)
    if not dataset.manifest:
        return "\n".join([*lines, f"  no {MANIFEST} of ours, so nothing is stated about the text"])
    if dataset.manifest["license"] != "unknown":
        lines.append(f"  license of the text: {dataset.manifest['license']}")
    if dataset.manifest["note"]:
        lines.append(f"  {dataset.manifest['note']}")
    for split in SPLITS:
        s = dataset.manifest["splits"][split]
        if s["bytes"] != s["bytes_scored"] or s["documents_changed"]:
            lines.append(
                f"  note: BPB on {split} divides by {s['bytes_scored']:,} bytes, the original text "
                f"has {s['bytes']:,}: {s['leading_spaces']} leading spaces are free, "
                f"{s['literal_u2581']} U+2581 count 1 byte for 3, and the tokenizer changes "
                f"{s['documents_changed']:,} of {s['documents']:,} documents"
            )
    if dataset.manifest["tokenizer_changes"]:
        lines.append(
            f"  the tokenizer changes {', '.join(dataset.manifest['tokenizer_changes'])}: "
            "compare BPB only with runs on the same text through the same normalisation"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run `pgolf data` with the arguments behind it; 0 if all went well.

    Raises:
        PgolfError: for what the user can fix.
    """
    args = _parser().parse_args(argv)
    if args.command == "prepare":
        if args.tokenizer and args.vocab_size is not None:
            raise ConfigError(
                f"--vocab-size {args.vocab_size} is for a tokenizer to be trained, and --tokenizer "
                "names one: leave one of them out"
            )
        source = TextSource(args.text, args.field)
        for folder, counts in source.skipped.items():
            print(f"{folder}: not read: {tally(counts)}", file=sys.stderr)
        name = re.sub(r"[^A-Za-z0-9]+", "-", bare_name(args.text[0])).strip("-")
        dataset = prepare(
            source,
            args.out,
            args.name or name or "text",
            license=args.license,
            vocab_size=VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
            tokenizer=args.tokenizer,
            val_fraction=args.val_fraction,
            shard_tokens=args.shard_tokens,
            replace="prepared" if args.force else "same",
        )
    elif args.command == "fetch":
        dataset = fetch(args.variant, args.out, args.train_shards)
    else:
        dataset = Dataset.open(args.folder, args.tokenizer)
    print(describe(dataset))
    if args.command == "verify":
        dataset.verify()
        check_held_out(dataset, again=True)
        stated = "and sha256 " if dataset.manifest else "(no sha256 is stated) "
        print(f"  every shard is whole: sizes, tokens {stated}are as they should be")
        print("  no training shard holds a document that is held out")
    return 0
