"""PR 531: full RoPE, XSA on the last 4 layers, SWA, int5 MLP and int6 attention."""

from pgolf.recipes import common
from pgolf.recipes.recipe import Recipe
from pgolf.recipes.recipe import Value as V

RECIPE = Recipe(
    name="pr531",
    title="11 layers, XSA on 4, relu^2, bigram 10240x128, full RoPE, SWA, int5/int6",
    source="PR 531 of openai/parameter-golf: 1.13508 and 1.12977 BPB, both over 16 MB",
    values=common.with_values(
        common.SHARED_VALUES,
        (
            V("mlp_hidden", 1536, "C"),
            V("activation", "relu2", "C"),
            V("xsa_layers", "last:4", "C"),
            V("rope_dims", 64, "C"),
            V("rope_base", 10000.0, "C"),
            V("layer_scale", False, "C"),
            V("ve_layers", "none", "C"),
            V("ve_dim", 128, "C", "not used: ve_layers=none"),
            V("bigram_buckets", 10240, "C"),
            V("bigram_dim", 128, "C"),
            V("resid_mix", "identity", "C"),
            V("backout", False, "C"),
            V("proj_init", "scaled", "C"),
            V("matrix_lr", 0.02, "C"),
            V("embed_lr", 0.03, "C"),
            V("scalar_lr", 0.02, "C"),
            V("matrix_wd", 0.04, "C"),
            V("embed_wd", 0.01, "C"),
            V("scalar_wd", 0.01, "C"),
            V("side_proj_optimizer", "muon", "C"),
            V("momentum_warmup", 0.26, "I", "1500 steps of 5,722 (seed 1337)"),
            V("warmdown", 0.52, "I", "3000 steps of 104.9 ms in 600 s (seed 1337)"),
            V("warmdown_iters", 3000, "C"),
            V("averaging", "swa", "L", "the logged runs have no EMA"),
            V("swa_start", 0.79, "I", "learning-rate multiplier below 0.4"),
            V("swa_every", 0.0087, "I", "50 steps of 5,722"),
            V("swa_start_lr", 0.4, "C"),
            V("attn_bits", "6", "C"),
            V("mlp_bits", "5", "C"),
            V("bigram_bits", "8", "C"),
            V("ve_bits", "8", "P", "not used: no value embedding"),
            V("tok_bits", "16", "C"),
            V("bits_overrides", "blocks.8.attn.c_k.weight=16", "C"),
            V("clip_percentiles", "0.999,0.9995,0.9999,0.99999,1", "C"),
            V("full_range", False, "P", "symmetric, as in training"),
            V(
                "qat_start",
                0.92,
                "I",
                "learning-rate multiplier below 0.15; not in the logged runs",
            ),
            V("qat_start_lr", 0.15, "C"),
            V("qat_lr_scale", 1.0, "C"),
            V("qat_clip_mask", False, "C", "the gradient passes clipped weights"),
        ),
    ),
    corrections=(
        "Published over the limit (17.5 and 17.0 MB): here the steps are as coarse as the limit "
        "asks. Ways to have them finer, by key: bigram_buckets=2048, tok_bits=8.",
        "Late QAT came after the logged runs and rounded the MLP to 6 bits where export used 5; "
        "here it uses each tensor's own grid and acts.",
        "Snapshots are averaged in fp32 on the device; bf16 tables were summed in bf16 on the CPU.",
        common.SHARE_CORRECTION,
        common.ROW_CORRECTION,
        "Codes are symmetric; -32 and -16 are not used.",
        common.GPTQ_CORRECTION,
        common.SIZE_CORRECTION,
        common.EVAL_CORRECTION,
    ),
    as_published=common.with_values(
        common.AS_PUBLISHED,
        (
            V("qat_start", 1.0, "L", "absent from the logged runs"),
            V(
                "averaging",
                "ema_then_swa",
                "C",
                "the script of record loads the EMA, then SWA over it",
            ),
            V("full_range", True, "C"),
            V("codec", "zstd", "C", "zstd-22, in our container"),
        ),
    ),
)
