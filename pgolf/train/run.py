"""`pgolf train`: from a configuration to a scored artifact."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pgolf.bpb import ByteTable
from pgolf.config import Config, with_overrides
from pgolf.data.corpus import ensure_default_dataset
from pgolf.data.loader import SequentialLoader
from pgolf.data.manifest import Dataset
from pgolf.data.shards import load_validation
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import pick_dtype
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.gpt import DTYPES
from pgolf.model.init import init_weights
from pgolf.ops import registry
from pgolf.ops.attention import choose
from pgolf.progress import format_seconds
from pgolf.recipes.recipe import Recipe
from pgolf.report.html import write_report
from pgolf.report.table import result_table
from pgolf.train.export import export
from pgolf.train.finish import score_artifact, write_result
from pgolf.train.interrupt import Interrupt
from pgolf.train.ranks import Ranks
from pgolf.train.run_folder import RunFolder
from pgolf.train.trainer import Trainer, compiles

DEFAULT_DATA = Path("data")


def open_data(config: Config, ranks: Ranks) -> Dataset:
    """The run's shards; the embedded corpus is prepared by rank 0 if it is the one wanted.

    Raises:
        DataError: shards or tokenizer are missing, damaged or mixed up.
        ConfigError: the tokenizer is larger than the model's vocabulary.
    """
    if config.data.data:
        dataset = Dataset.open(config.data.data, config.data.tokenizer or None)
    else:
        if config.data.tokenizer:
            raise ConfigError(
                f"tokenizer={config.data.tokenizer} needs data=FOLDER, shards that it made: the "
                "embedded corpus has a tokenizer of its own"
            )
        ranks.on_first(lambda: ensure_default_dataset(DEFAULT_DATA))
        dataset = ensure_default_dataset(DEFAULT_DATA)
    if dataset.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {dataset.folder} has {dataset.vocab_size} pieces, the model "
            f"{config.model.vocab_size}: use vocab_size={dataset.vocab_size}"
        )
    return dataset


def with_dataset(config: Config, dataset: Dataset) -> Config:
    """The settings as config.json has them, where `pgolf eval` and `pgolf pack` read the places."""
    return with_overrides(
        config,
        {
            "data": str(dataset.folder.resolve()),
            "tokenizer": str(dataset.tokenizer_path.resolve()),
        },
    )


def opening_lines(
    title: str, config: Config, dataset: Dataset, folder: Path, reasons: Mapping[str, str]
) -> str:
    """What a run says before it starts: what it is, what limits it, what counts."""
    s, lines = config.schedule, []
    limits = [f"{s.max_seconds:g} s"] if s.max_seconds else []
    limits += [f"{s.max_tokens:,} tokens"] if s.max_tokens else []
    limits += [f"{s.max_steps:,} steps"] if s.max_steps else []
    lines.append(title)
    lines.append(f"  run folder      {folder}")
    lines.append(f"  data            {dataset.folder} (corpus {dataset.corpus})")
    lines += [f"  {name:<15} {reason}" for name, reason in reasons.items()]
    lines.append(
        f"  budget          {' or '.join(limits)} of training; compilation, validation and "
        "checkpoints are off the clock"
    )
    if config.artifact.budget_bytes:
        lines.append(f"  size limit      {config.artifact.budget_bytes:,} bytes of code + model")
    if config.seed_exact:
        listed = f"what `pgolf recipes {config.recipe}` lists"
        lines.append(f"  seed_exact      {listed} is as published")
    return "\n".join(lines)


def build(
    title: str, config: Config, ranks: Ranks, dataset: Dataset, folder: RunFolder, note: str
) -> Trainer:
    """The model with its initial weights and the trainer around it; says what was chosen."""
    dtype, why = pick_dtype(config.run.compute_dtype, ranks.device)
    backend, attention = choose(
        ranks.device, dtype, config.run.attention, config.model.dim // config.model.heads
    )
    if ranks.device.type == "cuda":
        # Matmuls that stay in fp32 may use TF32, as in the published scripts.
        torch.set_float32_matmul_precision("high")
    ops = registry.choose_all(
        config.run.ops, ranks.device.type, dtype, compiles(config, ranks.device)
    )
    model = GPT(
        config.model,
        dtype,
        backend,
        config.data.seq_len,
        {name: choice.impl for name, choice in ops.items()},
    )
    init_weights(model, config.run.seed)
    val = load_validation(
        dataset.folder, config.model.vocab_size, config.data.seq_len, config.eval.val_tokens
    )
    table = ByteTable(load_tokenizer(dataset.tokenizer_path), config.model.vocab_size)
    loader = SequentialLoader(
        dataset.train_shards, ranks.rank, ranks.world, config.model.vocab_size
    )
    model.to(ranks.device)
    ranks.share(model.parameters())
    trainer = Trainer(config, ranks, folder, model, loader, val, table)
    reasons = {
        "device": f"{ranks.device}, {ranks.world} rank{'s' * (ranks.world > 1)}",
        "compute": f"{str(dtype).removeprefix('torch.')} ({why})",
        "attention": attention,
        **{name: f"{choice.impl} ({choice.reason})" for name, choice in ops.items()},
        "model": f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "batch": f"{config.data.batch_tokens:,} tokens a step, {trainer.accum} pass"
        f"{'es' * (trainer.accum > 1)} of {trainer.local_tokens:,} a rank",
    }
    if note:
        reasons["environment"] = note
    trainer.say(opening_lines(title, config, dataset, folder.path, reasons))
    return trainer


def train(
    title: str, config: Config, ranks: Ranks, note: str
) -> tuple[Config, Dataset, RunFolder, Trainer]:
    """Open the data and the run folder, build the model, train until the budget is spent.

    Args:
        title: what the run is, in one line.
        note: which settings the environment gave.
    """
    folder = RunFolder(_folder(config, ranks), writes=ranks.first)
    dataset = open_data(config, ranks)
    config = with_dataset(config, dataset)
    trainer = build(title, config, ranks, dataset, folder, note)
    ranks.on_first(lambda: folder.open(config, dataset.tokenizer_path))
    trainer.warm_up()
    if config.run.resume:
        state, path = folder.load(ranks.device)
        trainer.load_state_dict(state)
        folder.forget_after(trainer.clock.step)
        trainer.say(f"going on from {path}")
    with Interrupt(folder.path, config.recipe) as interrupt:
        trainer.train(interrupt)
    return config, dataset, folder, trainer


def run(recipe: Recipe, config: Config, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Train, pack, decode, score, report. Returns the result, None on ranks but the first."""
    started = time.perf_counter()
    ranks = Ranks.start(config.run.device)
    try:
        note = ", ".join(f"{k}={v}" for k, v in environment.items())
        config, dataset, folder, trainer = train(
            f"{recipe.name}: {recipe.title}", config, ranks, note
        )
        result = finish(config, ranks, dataset, folder, trainer)
        trainer.say(f"done in {format_seconds(time.perf_counter() - started)}")
    finally:
        ranks.stop()
    return result


def _folder(config: Config, ranks: Ranks) -> Path:
    """The run folder that rank 0 chose, on every rank."""
    chosen = [ranks.on_first(lambda: RunFolder.choose(config))]
    if ranks.world > 1:
        torch.distributed.broadcast_object_list(chosen, 0, device=ranks.device)
    return chosen[0]


def finish(
    config: Config, ranks: Ranks, dataset: Dataset, folder: RunFolder, trainer: Trainer
) -> dict[str, Any] | None:
    """Pack, score the live weights and the decoded bytes, write, show and return the result."""
    exported = trainer.take_export()
    model = trainer.model
    dtype, attention = model.compute_dtype, model.backend
    packed = export(model, config, dataset, ranks, folder.artifact, trainer.say)
    reserve = config.schedule.reserve_s
    if packed is not None and 0 < reserve < packed.seconds:
        trainer.say(
            f"calibration and quantisation took {format_seconds(packed.seconds)}: raise "
            f"reserve_s={reserve:g} for them to be within max_seconds"
        )
    live = None
    if config.eval.score_live:
        live = trainer.score(config.eval.stride, "scoring live")
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # what training has cached is not free to the scoring process
    name = next(n for n, d in DTYPES.items() if d == dtype)
    decoded = score_artifact(folder.artifact, config, dataset, ranks, name)
    result = None
    if packed is not None:
        result = write_result(
            folder.result,
            config,
            dataset,
            packed,
            trainer.clock,
            decoded,
            live,
            exported,
            trainer.val,
            ranks,
            dtype,
            attention,
            model.ops,
        )
        print(result_table(result))
        print(f"\n{write_report(folder.path)}")
    return result
