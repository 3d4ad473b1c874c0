"""The four published systems' model settings, written down a second time, full size and small."""

import dataclasses

from pgolf.config import ModelConfig

BASE_2048 = 10000 * 2 ** (16 / 14)  # what the published NTK rule gives for 16 dims at length 2048

PARTIAL = dict(rope_dims=16, rope_base=BASE_2048, layer_scale=True)
VALUES = dict(ve_layers="9,10", ve_dim=128)

PUBLISHED = {
    "pr478": ModelConfig(
        activation="relu2",
        xsa_layers="all",
        bigram_buckets=2048,
        bigram_dim=128,
        resid_mix="phase",
        proj_init="scaled",
        backout=False,
        **PARTIAL,
        **VALUES,
    ),
    "pr531": ModelConfig(
        activation="relu2",
        xsa_layers="last:4",
        bigram_buckets=10240,
        bigram_dim=128,
        resid_mix="identity",
        proj_init="scaled",
        rope_dims=64,
        rope_base=10000.0,
        layer_scale=False,
        ve_layers="none",
    ),
    "pr543": ModelConfig(
        activation="relu2",
        mlp_hidden=1408,
        xsa_layers="7-10",
        bigram_buckets=0,
        resid_mix="identity",
        proj_init="scaled",
        **PARTIAL,
        **VALUES,
    ),
    "pr1473": ModelConfig(
        activation="leaky_relu2",
        xsa_layers="all",
        bigram_buckets=3072,
        bigram_dim=112,
        resid_mix="identity",
        proj_init="unit",
        **PARTIAL,
        **VALUES,
    ),
}

PARAMETERS = {
    "pr478": 26_993_756,
    "pr531": 27_878_489,
    "pr543": 25_224_283,
    "pr1473": 27_067_484,
}


def small(config: ModelConfig, **changes: object) -> ModelConfig:
    """The same structure, all 11 layers, at toy widths and in fp32 tables."""
    sizes = dict(
        vocab_size=24,
        dim=16,
        heads=4,
        kv_heads=2,
        mlp_hidden=20,
        ve_dim=6,
        bigram_dim=10,
        bigram_buckets=min(config.bigram_buckets, 37),
        rope_dims=min(config.rope_dims // 8, 4),
        table_dtype="fp32",
    )
    return dataclasses.replace(config, **{**sizes, **changes})
