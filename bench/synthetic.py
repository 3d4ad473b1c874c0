"""Text of made-up words with some structure to learn, where there is no corpus and no network."""

import random
from collections.abc import Iterator
from pathlib import Path

from pgolf.data.manifest import Dataset
from pgolf.data.prepare import prepare
from pgolf.data.readers import Document


class Words:
    """Documents of `length` words, drawn from some that are rarer the later they come.

    Args:
        vocabulary: different words.
        documents: their number.
    """

    def __init__(
        self, seed: int = 0, vocabulary: int = 200, documents: int = 300, length: int = 80
    ):
        rng = random.Random(seed)
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(vocabulary)]
        weights = range(vocabulary, 0, -1)
        self.documents = [
            " ".join(rng.choices(words, weights=weights, k=length)) + ".\n"
            for _ in range(documents)
        ]
        self.size = sum(map(len, self.documents))

    def __iter__(self) -> Iterator[Document]:
        return (Document(text, f"document {i}") for i, text in enumerate(self.documents))


def dataset(folder: Path) -> Dataset:
    """Shards of the recipes' vocabulary, 1,024 pieces: some 400,000 tokens, made in seconds."""
    source = Words(vocabulary=3000, documents=1000, length=300)
    return prepare(source, folder, "synthetic", note="made-up words")


if __name__ == "__main__":  # python -m bench.synthetic FOLDER
    import sys

    made = dataset(Path(sys.argv[1]))
    print(f"{made.folder}: {made.vocab_size} pieces")
