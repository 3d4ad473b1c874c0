"""Which share of pairs of pieces the right tokenizer gives back, and wrong ones of its size.

`python -m pytest tests/data/test_foreign.py -s` prints the shares that NOTES.md states.
"""

import numpy as np
import pytest

from pgolf.data.corpus import WIKI_ID, default_corpus, ensure_default_dataset
from pgolf.data.shards import open_shard
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer
from pgolf.scoring.bpb import pairs_lost

CHECKED = 8192


def share(sp, tokens) -> float:
    lost, pairs = pairs_lost(sp, tokens[:CHECKED])
    return 1 - lost / pairs


@pytest.mark.slow
@pytest.mark.parametrize("size", [300, 320, 400, 512, 1024, 2048, 4096])
def test_models_of_one_size(size, documents, tmp_path):
    """Two of them are as alike as can be: each second document of one corpus."""
    wiki = default_corpus()
    if wiki.id != WIKI_ID:
        pytest.skip("the extra `demo` is not installed")
    models = {
        name: train_tokenizer(texts, tmp_path / f"{name}.model", size)
        for name, texts in (
            ("even leads", wiki.documents[:4000:2]),
            ("odd leads", wiki.documents[1:4000:2]),
            ("source code", documents),
        )
    }
    for name, sp in models.items():
        ids = np.concatenate([sp.encode(t, add_bos=True) for t in wiki.documents[5000:5150]])
        shares = {other: share(model, ids) for other, model in models.items()}
        print(f"\n{size} pieces, tokens by {name}:", {k: f"{v:.4f}" for k, v in shares.items()})
        assert shares.pop(name) > 0.9995, "what the end cuts"
        assert max(shares.values()) < 0.98


@pytest.mark.slow
def test_right_models(shared_data, tmp_path):
    """The embedded corpus and the contest's shards, each with its own model and the other's."""
    web = shared_data / "fineweb_edu_1MB"
    ours = ensure_default_dataset(tmp_path)
    tokens = {
        "embedded": open_shard(ours.val_shards[0], 1024),
        "contest": open_shard(web / "fineweb_val_000000.bin", 1024),
    }
    models = {
        "embedded": ours.tokenizer_path,
        "contest": shared_data / "tokenizers" / "fineweb_1024_bpe.model",
        "look-alike": shared_data / "negative" / "no_byte_fallback_1024.model",
    }
    for name, ids in tokens.items():
        shares = {k: share(load_tokenizer(path), ids) for k, path in models.items()}
        print(f"\n{name} tokens:", {k: f"{v:.4f}" for k, v in shares.items()})
        assert shares.pop(name) == 1.0
        assert max(shares.values()) < 0.98
    sp = load_tokenizer(shared_data / "tokenizers" / "fineweb_8192_bpe.model")
    ids = np.array(sp.encode((web / "text.txt").read_text()))
    assert share(sp, ids) == 1.0
    # from the middle of a word on
    assert share(sp, ids[5001:]) > 0.999
