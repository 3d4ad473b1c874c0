"""The settings of a run, one frozen dataclass a section; `pgolf.config` puts them together.

Field names are unique over all sections. Shares are fractions of the run: of its time, token or
step budget, whichever is spent furthest.
"""

from dataclasses import dataclass

from pgolf.errors import ConfigError
from pgolf.fields import opt


@dataclass(frozen=True)
class ModelConfig:
    """What is needed to rebuild the model; stored in the artifact."""

    vocab_size: int = opt(
        1024,
        "rows of the token table; if not given, at most the tokenizer's pieces",
        ge=4,
        le=65536,
    )
    layers: int = opt(11, "transformer blocks", ge=1, le=256)
    dim: int = opt(512, "residual width", ge=8, le=16384)
    heads: int = opt(8, "query heads", ge=1)
    kv_heads: int = opt(4, "key/value heads; divides heads", ge=1)
    mlp_hidden: int = opt(1536, "hidden width of the MLP", ge=1)
    activation: str = opt("leaky_relu2", "MLP activation", choices=("relu2", "leaky_relu2"))
    leaky_slope: float = opt(0.5, "slope of leaky_relu2 below zero, before squaring", ge=0, le=1)
    qk_norm: bool = opt(True, "RMS-normalise q and k per head")
    qk_gain: float = opt(1.5, "initial gain of q per head, learned", gt=0)
    rope_dims: int = opt(16, "leading head dims that RoPE rotates; 0 = none", ge=0)
    rope_base: float = opt(10000.0, "RoPE base, the same at every length", gt=1)
    xsa_layers: str = opt("all", "layers with XSA: all, none, last:N, or indices as 0,3,7-10")
    tied_embedding: bool = opt(True, "logits from the token table; False adds an output matrix")
    bigram_buckets: int = opt(0, "rows of the hashed bigram table; 0 = no BigramHash", ge=0)
    bigram_dim: int = opt(128, "width of the bigram table", ge=1)
    ve_layers: str = opt("none", "layers that add the shared value embedding to v")
    ve_dim: int = opt(128, "width of the shared value-embedding table", ge=1)
    smear: str = opt(
        "plain",
        "SmearGate: off, plain, or no smear across BOS",
        choices=("off", "plain", "bos_masked"),
        renamed={"seed": "plain"},
    )
    bos_id: int = opt(1, "id of the document start, for smear=bos_masked and documents", ge=0)
    documents: bool = opt(False, "attention, SmearGate and bigrams see only their own document")
    resid_mix: str = opt(
        "identity",
        "x0 mixing: off, or its init (identity (1,0) or PR 478's phase)",
        choices=("off", "identity", "phase"),
    )
    layer_scale: bool = opt(True, "scale normed block inputs by 1/sqrt(layer + 1)")
    unet_skips: bool = opt(True, "learned skips from the first half to the second, last to first")
    backout: bool = opt(
        False, "subtract a learned multiple of the middle block's output at the end"
    )
    softcap: float = opt(30.0, "logits = c tanh(logits / c); 0 = off", ge=0)
    norm_eps: float = opt(1e-6, "eps of every RMS norm", gt=0)
    embed_std: float = opt(0.005, "std of the token table at init", gt=0)
    proj_init: str = opt(
        "unit",
        "orthogonal init of the bigram and value projections: gain 1 or 1/sqrt(2 layers)",
        choices=("unit", "scaled"),
    )
    table_dtype: str = opt(
        "bf16",
        "dtype of the embedding tables in training, their AdamW moments included",
        choices=("bf16", "fp32"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Muon for matrices, AdamW for tables and scalars."""

    matrix_lr: float = opt(0.025, "Muon learning rate", gt=0)
    embed_lr: float = opt(0.035, "AdamW learning rate of tables", gt=0)
    scalar_lr: float = opt(0.025, "AdamW learning rate of scalars and vectors", gt=0)
    matrix_wd: float = opt(0.04, "decoupled weight decay of Muon", ge=0)
    embed_wd: float = opt(0.04, "decoupled weight decay of tables", ge=0)
    scalar_wd: float = opt(0.04, "decoupled weight decay of scalars and vectors", ge=0)
    side_proj_optimizer: str = opt(
        "muon",
        "optimiser of bigram.proj and ve_shared.proj (banked scripts use AdamW)",
        choices=("muon", "adamw"),
    )
    momentum: float = opt(0.99, "Muon momentum after its warm-up", ge=0, le=0.9999)
    momentum_start: float = opt(0.92, "Muon momentum at step 0", ge=0, le=0.9999)
    momentum_warmup: float = opt(0.2, "share of the run in which momentum rises", ge=0, le=1)
    nesterov: bool = opt(True, "Nesterov momentum in Muon")
    ns_steps: int = opt(5, "Newton-Schulz iterations", ge=1, le=20)
    ns_dtype: str = opt(
        "auto",
        "dtype of Newton-Schulz; auto = bf16 where the hardware has it",
        choices=("auto", "bf16", "fp32"),
    )
    ns_coefficients: str = opt(
        "classic",
        "Newton-Schulz coefficients: the same every step, or those of Polar Express",
        choices=("classic", "polar_express"),
    )
    ns_row_norm: bool = opt(False, "divide each row of Muon's direction by its norm (MuonEq-R)")
    beta1: float = opt(0.9, "AdamW beta1", ge=0, le=0.9999)
    beta2: float = opt(0.95, "AdamW beta2", ge=0, le=0.99999)
    adam_eps: float = opt(1e-8, "AdamW eps", gt=0)
    grad_clip: float = opt(0.3, "limit of the norm of all gradients; 0 = off", ge=0)
    clip_scope: str = opt(
        "global",
        "gradients whose norm grad_clip limits: the mean of all ranks, or those of each rank by "
        "themselves, before they are added up, as PR 1473 has it",
        choices=("global", "local"),
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """Budget and learning-rate schedule. At least one of the three limits must be set."""

    max_seconds: float = opt(0.0, "training time budget in s; 0 = no limit", ge=0)
    reserve_s: float = opt(
        0.0, "seconds of max_seconds kept for calibration and quantisation", ge=0
    )
    max_tokens: int = opt(0, "token budget; 0 = no limit", ge=0)
    max_steps: int = opt(0, "step budget; 0 = no limit", ge=0)
    schedule: str = opt(
        "share",
        "warm-down, momentum, averaging and QAT by share of the run, or by iterations "
        "as the published scripts have it",
        choices=("share", "iterations"),
    )
    warmdown: float = opt(0.5, "share of the run in which the learning rate falls", ge=0, le=1)
    lr_floor: float = opt(0.0, "learning-rate multiplier at the end", ge=0, le=1)
    warmdown_iters: int = opt(3500, "warm-down in steps, for schedule=iterations", ge=0)
    momentum_warmup_iters: int = opt(1500, "momentum warm-up, for schedule=iterations", ge=0)


@dataclass(frozen=True)
class AverageConfig:
    """Weight averaging: which weights are exported."""

    averaging: str = opt(
        "ema",
        "exported weights; ema_then_swa = EMA unless 2 SWA snapshots exist",
        choices=("none", "ema", "swa", "ema_then_swa"),
    )
    ema_start: float = opt(0.3, "share of the run before which nothing is averaged", ge=0, le=1)
    ema_horizon: float = opt(0.05, "time constant of the EMA as a share of the run", gt=0, le=1)
    ema_decay: float = opt(0.997, "EMA decay from step 0, for schedule=iterations", ge=0, le=1)
    swa_start: float = opt(0.8, "share of the run at which SWA snapshots begin", ge=0, le=1)
    swa_every: float = opt(0.01, "share of the run between two snapshots", gt=0, le=1)
    swa_start_lr: float = opt(
        0.4, "learning-rate multiplier below which SWA begins, for schedule=iterations", ge=0, le=1
    )
    swa_every_iters: int = opt(50, "steps between snapshots, for schedule=iterations", ge=1)


BITS = ("4", "5", "6", "7", "8", "8/4", "16")


@dataclass(frozen=True)
class QuantConfig:
    """What is stored for each tensor, and late QAT on the same grids.

    Bits are '4' to '8', '16' for fp16, or '8/4' for int8 codes rounded to multiples of 4 (PR 543).
    """

    attn_bits: str = opt("6", "attention matrices", choices=BITS)
    mlp_bits: str = opt("6", "MLP matrices", choices=BITS)
    tok_bits: str = opt("8", "token table", choices=BITS)
    bigram_bits: str = opt("6", "bigram table", choices=BITS)
    ve_bits: str = opt("6", "value-embedding table", choices=BITS)
    bits_overrides: str = opt("", "name patterns first, as blocks.0.*=8,blocks.8.attn.c_k*=16")
    small_numel: int = opt(65536, "tensors of at most so many elements are stored as fp16", ge=0)
    clip_search: str = opt(
        "row",
        "clip of searched grids: best percentile per row, per matrix, or the row's maximum",
        choices=("row", "matrix", "max"),
    )
    clip_percentiles: str = opt("0.999,0.9995,0.9999,0.99999,1", "candidates, 1 = row maximum")
    max_clip_bits: str = opt("5", "bits that always take the row's maximum, as 5,7; none = ''")
    int8_percentile: float = opt(0.9999984, "clip of 8-bit rows", gt=0.5, le=1)
    min_step: float = opt(
        0.0,
        "floor of a row's step as a multiple of 1/qmax (published: 1; not for 5 bits)",
        ge=0,
        le=100,
    )
    full_range: bool = opt(False, "codes from -qmax-1 (PR 531) instead of -qmax")
    quantizer: str = opt(
        "gptq",
        "gptq weighs errors by the inputs of each matrix; lite only searches clips",
        choices=("gptq", "lite"),
    )
    grid: str = opt(
        "rows",
        "rows: k-bit codes with a clip and a step for each row; uniform: one step a matrix, times "
        "column steps from the Hessian, no clip: the entropy coder pays for what is used. With "
        "gptq, bits then only set how fine all steps are, and 16 stays fp16",
        choices=("rows", "uniform"),
    )
    width: float = opt(
        4.5, "grid=uniform: the largest code of the nominal bits, in rms of the weights", gt=0
    )
    rate_weight: float = opt(
        0.0, "grid=uniform: weight of the bits against the error when a code is chosen", ge=0, le=10
    )
    clip_widths: str = opt("", "more clip candidates for gptq, in std of the row, as 3.5,4,5")
    damping: float = opt(
        0.01, "share of the mean diagonal that gptq adds to a Hessian's", gt=0, le=10
    )
    calibration: str = opt(
        "train",
        "text for the Hessians: training shards, or generated by the model itself",
        choices=("train", "self"),
    )
    calibration_sequences: int = opt(
        64, "its sequences of seq_len tokens; an eighth more judge the result", ge=1, le=65536
    )
    calibration_temperature: float = opt(0.8, "temperature of calibration=self", gt=0, le=100)
    qat_start: float = opt(
        0.9, "share of the run at which fake-quant starts; 1 = never", ge=0, le=1
    )
    qat_start_lr: float = opt(
        0.15, "learning-rate multiplier below which it starts, for schedule=iterations", ge=0, le=1
    )
    qat_clip_mask: bool = opt(False, "in late QAT, no gradient for weights whose code is clipped")
    qat_lr_scale: float = opt(1.0, "learning-rate factor from then on (PR 543: 0.5)", gt=0, le=1)


@dataclass(frozen=True)
class ArtifactConfig:
    """Packing and the size limit."""

    codec: str = opt(
        "auto",
        "compressor; rans is the entropy coder for weights, auto keeps the smallest",
        choices=("auto", "rans", "zstd", "lzma", "brotli"),
    )
    packing: str = opt(
        "auto",
        "integer codes for zstd, lzma and brotli: by rows, by columns, or the smaller of both",
        choices=("auto", "bytes", "columns"),
    )
    zstd_level: int = opt(22, "zstd level", ge=1, le=22)
    lzma_preset: int = opt(9, "lzma preset", ge=0, le=9)
    brotli_quality: int = opt(11, "brotli quality", ge=0, le=11)
    budget_bytes: int = opt(16_000_000, "limit of code + model; 0 = none", ge=0)
    fit_to_budget: bool = opt(
        False,
        "choose the steps of all matrices together so that code + model fill the budget; if not "
        "given, true with grid=uniform, quantizer=gptq and a given budget",
    )
    prune_to_fit: bool = opt(True, "zero the cheapest codes of +-1 if the budget is exceeded")


@dataclass(frozen=True)
class DataConfig:
    """Shards, tokenizer and batch."""

    data: str = opt("", "folder of shards; '' = prepare and use the embedded demo corpus")
    tokenizer: str = opt("", "SentencePiece model; '' = the one that belongs to the shards")
    order: str = opt(
        "sequential",
        "order of sequences: sequential = as in the shards; coprime = evenly from all shards; "
        "shuffled = at random from all shards",
        choices=("sequential", "coprime", "shuffled"),
    )
    held_out: str = opt(
        "refuse",
        "training shards that hold a held-out document: refuse them, or allow it and say so",
        choices=("refuse", "allow"),
    )
    seq_len: int = opt(2048, "tokens per sequence", ge=8, le=65536)
    batch_tokens: int = opt(786_432, "tokens per step, over all ranks", ge=8)
    micro_tokens: int = opt(
        98_304, "tokens per pass and rank, at most; also a slice of order=sequential", ge=8
    )


@dataclass(frozen=True)
class EvalConfig:
    """Validation while training and the reported score."""

    stride: int = opt(64, "targets scored by each window after the first", ge=1)
    val_tokens: int = opt(0, "validate on the first N tokens only; 0 = all", ge=0)
    val_every: int = opt(0, "steps between validations while training; 0 = only at the end", ge=0)
    eval_tokens: int = opt(65_536, "tokens per forward pass in evaluation, at most", ge=8)
    score_live: bool = opt(True, "also score the weights before quantisation with the same windows")


@dataclass(frozen=True)
class RunConfig:
    """Where and how to run."""

    seed: int = opt(1337, "of the initial weights and the order of sequences", ge=0, le=2**31 - 1)
    out: str = opt("", "run folder; '' = runs/RECIPE-seedSEED, with -2, -3 ... if that exists")
    resume: bool = opt(False, "continue from the newest checkpoint in out=FOLDER")
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    compute_dtype: str = opt(
        "auto",
        "dtype of activations and matmuls; auto = bf16 where the hardware has it",
        choices=("auto", "bf16", "fp32"),
    )
    attention: str = opt(
        "auto",
        "the same as attention=... in ops; auto takes the first of FlashAttention 3, 4, 2, SDPA "
        "that runs",
        choices=("auto", "fa3", "fa4", "fa2", "sdpa"),
    )
    ops: str = opt(
        "",
        "implementations of operators, as xsa=triton,newton_schulz=reference, or one name for all "
        "(operators without such kernels run the reference); '' = auto for each, see pgolf doctor",
    )
    compile: str = opt("auto", "torch.compile; auto = on CUDA only", choices=("auto", "on", "off"))
    compile_warmup: int = opt(3, "steps off the clock to compile, then undone", ge=1, le=100)
    compile_cache: str = opt(
        "auto",
        "on CUDA, file or folder of compiled code for the next run; auto = in ~/.cache/pgolf; off",
    )
    graphs: str = opt(
        "auto",
        "replay steps as CUDA graphs; auto = on CUDA, with kernels for the optimisers' step",
        choices=("auto", "true", "false"),
    )
    patience: float = opt(
        30.0, "seconds that a rank may keep the others waiting in a step (4 steps, if longer)", ge=1
    )
    log_every: int = opt(10, "steps between log lines", ge=1)
    checkpoint_every: int = opt(
        200, "steps between checkpoints, and one at the end; 0 = none", ge=0
    )
    profile: str = opt("", "steps to trace, as 10:13, into profile-10-13.json.gz; '' = none")
    log: str = opt("", "also send metrics to tensorboard, trackio; pip install 'pgolf[log]'")


def profiled_steps(text: str) -> tuple[int, int]:
    """The first and the last step of '10:13'.

    Raises:
        ConfigError: it is something else.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigError(f"profile={text}: expected steps FIRST:LAST from 1 on, such as 10:13")
    return int(first), int(last)


def resolve_layers(key: str, text: str, layers: int) -> tuple[int, ...]:
    """Layer indices of 'all', 'none', 'last:N' or '0,3,7-10' in a model of `layers` blocks."""
    try:
        if text in ("none", ""):
            return ()
        if text == "all":
            return tuple(range(layers))
        if text.startswith("last:"):
            count = int(text[5:])
            if not 0 < count <= layers:
                raise ConfigError(f"{key}={text}: there are {layers} layers")
            return tuple(range(layers - count, layers))
        chosen: set[int] = set()
        for part in text.split(","):
            first, _, last = part.partition("-")
            low, high = int(first), int(last or first)
            if not 0 <= low <= high < layers:  # before a range of any size is built
                raise ConfigError(f"{key}={text}: layers are 0 to {layers - 1}")
            chosen.update(range(low, high + 1))
    except ValueError:
        raise ConfigError(f"{key}={text}: expected all, none, last:N or 0,3,7-10") from None
    return tuple(sorted(chosen))
