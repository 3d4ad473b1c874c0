"""What all four published systems share; each one's module adds what is its own."""

from pgolf.recipes.recipe import Value as V

NTK_BASE = 10000.0 * 2 ** (16 / 14)
NTK_NOTE = (
    "10000 rescaled by (2048/1024)^(d/(d-2)), d = 16, as the scripts do at their training length; "
    "here it is a constant at every length"
)
FLOOR_NOTE = (
    "steps are at least 1/31 (6 bits) or 1/127 (8 bits): it binds for rows below 1.0 and keeps "
    "the file small, so it stays on; min_step=0 is the finer grid"
)

SHARED_VALUES = (
    V("vocab_size", 1024, "C"),
    V("layers", 11, "C"),
    V("dim", 512, "C"),
    V("heads", 8, "C"),
    V("kv_heads", 4, "C"),
    V("qk_norm", True, "C"),
    V("qk_gain", 1.5, "C"),
    V("tied_embedding", True, "C"),
    V("smear", "plain", "C", "static gate, not masked at document starts"),
    V("bos_id", 1, "C"),
    V("documents", False, "C", "attention and bigrams run across documents"),
    V("leaky_slope", 0.5, "C", "used by PR 1473 alone"),
    V("unet_skips", True, "C", "4->5, 3->6, 2->7, 1->8, 0->9; layer 10 has none"),
    V("softcap", 30.0, "C"),
    V("norm_eps", 1e-6, "I", "scripts leave it to torch, whose default depends on the version"),
    V("embed_std", 0.005, "C"),
    V("table_dtype", "bf16", "C", "moments too"),
    V("nesterov", True, "C"),
    V("ns_steps", 5, "C"),
    V("ns_dtype", "auto", "C", "bf16 there; 60 times slower than fp32 on a CPU without bf16"),
    V("ns_coefficients", "classic", "C"),
    V("ns_row_norm", False, "C"),
    V("momentum", 0.99, "C"),
    V("momentum_start", 0.92, "C"),
    V("momentum_warmup", 0.22, "I", "1500 steps of about 6,800"),
    V("beta1", 0.9, "C"),
    V("beta2", 0.95, "C"),
    V("adam_eps", 1e-8, "C"),
    V("grad_clip", 0.3, "C"),
    V("clip_scope", "global", "C", "after the reduction over ranks"),
    V("max_seconds", 600.0, "C"),
    V("max_tokens", 0, "C"),
    V("max_steps", 0, "P", "the time limit decides"),
    V("schedule", "share", "P", "iteration counts mislead on other hardware"),
    V("lr_floor", 0.0, "C"),
    V("momentum_warmup_iters", 1500, "C"),
    V("ema_start", 0.5, "P", "at this horizon nothing earlier would still count"),
    V("ema_horizon", 0.049, "I", "decay 0.997 is 333 steps of about 6,800"),
    V("ema_decay", 0.997, "C"),
    V("swa_every_iters", 50, "C"),
    V("small_numel", 4096, "P", "scripts keep matrices of up to 65,536 weights in fp16"),
    V("quantizer", "gptq", "P", "errors weighed by what a matrix reads: NOTES.md has the figures"),
    V("grid", "uniform", "P", "no clips: the entropy coder pays for what is used"),
    V("width", 4.5, "P", "where the fit of the budget begins"),
    V("rate_weight", 0.0, "P", "no gain at equal bytes: NOTES.md"),
    V("clip_widths", "", "P", "for grid=rows"),
    V("damping", 0.01, "C", "PR 1473 adds it twice"),
    V("fit_to_budget", True, "P", "steps of all matrices fill the 16,000,000 bytes together"),
    V("calibration", "train", "P", "within the training time, as in later records"),
    V("calibration_sequences", 64, "C", "PR 1060 and PR 1473"),
    V("calibration_temperature", 0.8, "C", "PR 1473, for calibration=self"),
    V("reserve_s", 20.0, "I", "PR 1060 kept 14 s for one pass; the fit makes a few"),
    V("clip_search", "row", "P", "for grid=rows; the scripts choose one for a matrix"),
    V("max_clip_bits", "5", "C", "5-bit rows take their maximum and no floor"),
    V("int8_percentile", 0.9999984, "C"),
    V("min_step", 1.0, "C", f"for grid=rows: {FLOOR_NOTE}"),
    V("data", "data/datasets/fineweb10B_sp1024", "C", "where `pgolf data fetch` puts it"),
    V("tokenizer", "", "C", "data/tokenizers/fineweb_1024_bpe.model is found by its name"),
    V("order", "sequential", "C", "shard after shard"),
    V("held_out", "refuse", "P", "the scripts do not look"),
    V("seq_len", 2048, "C"),
    V("batch_tokens", 786_432, "C"),
    V("micro_tokens", 98_304, "C", "8 passes on one GPU, 1 on eight"),
    V("stride", 64, "C"),
    V("val_every", 500, "L"),
    V("checkpoint_every", 2000, "P"),
    V("budget_bytes", 16_000_000, "C", "decimal; one script's 15.9 'MB' were 16,672,358 bytes"),
    V("codec", "rans", "P", "the smallest in every measurement; auto tries all, for minutes"),
)

# What all scripts but PR 1473's do.
PUBLISHED_QUANT = (
    V("quantizer", "lite", "C"),
    V("grid", "rows", "C"),
    V("fit_to_budget", False, "C"),
    V("reserve_s", 0.0, "C"),
    V("small_numel", 65536, "C"),
)

AS_PUBLISHED = (
    *PUBLISHED_QUANT,
    V("schedule", "iterations", "C"),
    V("clip_search", "matrix", "C"),
    V("qat_start", 1.0, "C", "the switch was compiled in as off: late QAT never ran"),
)

QAT_CORRECTION = (
    "Late QAT acts: the script's switch was a class attribute that torch.compile had baked in as "
    "off. Here bits and switch are tensors of the one compiled graph."
)
RANGE_CORRECTION = (
    "Training and export share one quantiser, codes -qmax to qmax: scripts trained on -32..31 and "
    "exported -31..31."
)
ROW_CORRECTION = "The clip percentile is chosen per row: never worse in squared error."
SHARE_CORRECTION = (
    "Warm-down, momentum and averaging follow the share of the time spent, not iterations: on one "
    "GPU the published counts would start at a quarter of the learning rate."
)
ROPE_CORRECTION = (
    "The RoPE base is one constant: the scripts' rule gave 10000 below 1,025 tokens and 22,082 at "
    "the training length."
)
SIZE_CORRECTION = (
    "Steps are chosen so that code + model fill the 16,000,000 bytes and never exceed them; the "
    "scripts hoped, or pruned with a target in the wrong unit."
)
GPTQ_CORRECTION = (
    "Quantised by full GPTQ with column steps, on training text and within the 600 s, where the "
    "script searched one clip a matrix."
)
EVAL_CORRECTION = (
    "The sliding window scores every target once; scripts scored the last 64 32 times."
)
SWA_UNUSED = "The SWA snapshots that the script collected and never used are not taken."


def with_values(*groups: tuple[V, ...]) -> tuple[V, ...]:
    """Later groups replace earlier values of the same key."""
    return tuple({v.key: v for group in groups for v in group}.values())
