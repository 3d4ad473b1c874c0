"""Text from an artifact: `pgolf sample RUN --prompt ...`."""

import sys
from pathlib import Path

import torch

from pgolf.artifact.load import load_model
from pgolf.artifact.location import artifact_of
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import pick_device, pick_dtype
from pgolf.errors import ConfigError, DataError
from pgolf.files import sha256_of
from pgolf.model.decode import generate
from pgolf.model.frozen import frozen_copy
from pgolf.options import Parser


def main(argv: list[str]) -> int:
    """`pgolf sample`."""
    parser = Parser(
        prog="pgolf sample",
        description="Print text from the decoded artifact. The context is all text so far; when it "
        "is as long as the sequences that the model was trained on, it starts over with its last "
        "half.",
        epilog='example: pgolf sample runs/demo-seed1337 --prompt "The river"',
    )
    parser.add_argument("artifact", type=Path, help="artifact file, or the folder of its run")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to add (100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = most likely (0.8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizer", type=Path, help="default: tokenizer.model beside the artifact"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    if args.tokens < 1 or not 0 <= args.temperature <= 100:
        raise ConfigError("--tokens must be at least 1 and --temperature between 0 and 100")
    device = pick_device(args.device)
    artifact = artifact_of(args.artifact)
    path = args.tokenizer or artifact.parent / "tokenizer.model"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, and {artifact} holds no tokenizer: use --tokenizer FILE, the "
            "tokenizer.model of the run or of its shards"
        )
    model, meta = load_model(artifact, device, pick_dtype("auto", device)[0])
    sp = load_tokenizer(path)
    if sha256_of(path) != meta["tokenizer_sha256"]:
        raise DataError(
            f"{path} is not the tokenizer that {artifact} was trained with: use --tokenizer FILE"
        )
    prompt = torch.tensor([[sp.bos_id(), *sp.encode(args.prompt)]], device=device)
    chances = torch.rand(
        (1, args.tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(args.seed)
    ).to(device)
    ids = generate(
        frozen_copy(model),
        prompt,
        args.tokens,
        meta["seq_len"],
        sp.get_piece_size(),
        args.temperature,
        chances,
    )
    # A document that ends starts the next: show it as an empty line.
    documents: list[list[int]] = [[]]
    for token in ids[0, 1:].tolist():
        if token == sp.bos_id():
            documents.append([])
        else:
            documents[-1].append(token)
    sys.stdout.write("\n\n".join(sp.decode(d) for d in documents) + "\n")
    return 0
