"""`pgolf train`: from a configuration to a scored artifact."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from pgolf import recipes
from pgolf.bpb import ByteTable
from pgolf.config import Config, from_dict, with_overrides
from pgolf.data.corpus import ensure_default_dataset
from pgolf.data.loader import SequentialLoader
from pgolf.data.manifest import Dataset
from pgolf.data.shards import load_validation
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import dtype_name, pick_dtype
from pgolf.errors import BudgetError, ConfigError, DataError, StorageError
from pgolf.model import GPT
from pgolf.model.gpt import operator_sizes
from pgolf.model.init import init_weights
from pgolf.ops.attention import choose
from pgolf.ops.choose import choose_all
from pgolf.optim.schedule import Clock
from pgolf.progress import format_seconds
from pgolf.recipes.recipe import CONTEST_BYTES
from pgolf.report.html import write_report
from pgolf.report.table import result_table
from pgolf.train.estimate import free_memory, memory_line
from pgolf.train.export import export
from pgolf.train.finish import score_artifact, write_result
from pgolf.train.interrupt import Interrupt, Interrupted, resume_command
from pgolf.train.ranks import Ranks
from pgolf.train.run_data import find_dataset
from pgolf.train.run_folder import RunFolder, read_config
from pgolf.train.trainer import Trainer, compiles

DEFAULT_DATA = Path("data")


def open_data(config: Config, ranks: Ranks) -> Dataset:
    """The run's shards; the embedded corpus is prepared by rank 0 if it is the one wanted.

    Raises:
        DataError: shards or tokenizer are missing, damaged or mixed up.
        ConfigError: a tokenizer is named without shards.
    """
    if config.data.data:
        dataset = Dataset.open(config.data.data, config.data.tokenizer or None)
    else:
        if config.data.tokenizer:
            raise ConfigError(
                f"tokenizer={config.data.tokenizer} needs data=FOLDER, shards that it made: the "
                "embedded corpus has a tokenizer of its own"
            )
        try:
            ranks.on_first(lambda: ensure_default_dataset(DEFAULT_DATA))
        except StorageError as e:  # out= does not help
            raise DataError(
                f"{e}. The embedded corpus is prepared in {DEFAULT_DATA.resolve()}: go to another "
                "folder, or name shards that are prepared with data=FOLDER"
            ) from e
        dataset = ensure_default_dataset(DEFAULT_DATA)
    return dataset


def data_again(config: Config, folder: Path) -> Dataset:
    """The shards of a run that goes on, wherever they are now.

    Raises:
        DataError: they are not found, or others are named.
    """
    recorded, given = from_dict(read_config(folder)).data, config.data
    moved = given.data if given.data != recorded.data else ""
    other = given.tokenizer if given.tokenizer != recorded.tokenizer else ""
    return find_dataset(folder, recorded, moved, other)


def fit_vocabulary(config: Config, dataset: Dataset, follows: bool) -> Config:
    """The settings with a token table that the tokenizer fits.

    Args:
        follows: as many rows as the tokenizer has pieces; else those that were asked for.

    Raises:
        ConfigError: fewer were asked for.
    """
    if follows:
        return with_overrides(config, {"vocab_size": dataset.vocab_size})
    if dataset.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {dataset.folder} has {dataset.vocab_size} pieces, the model "
            f"{config.model.vocab_size}: use vocab_size={dataset.vocab_size}"
        )
    return config


def vocabulary_line(rows: int, pieces: int) -> str:
    """What the token table has, and how much of it no text can reach."""
    unused = f", {rows - pieces:,} of them unused: vocab_size={pieces} is enough" * (rows > pieces)
    return f"{rows:,} rows for {pieces:,} pieces{unused}"


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
    if config.as_published:
        listed = f"what `pgolf recipes {config.recipe}` lists"
        lines.append(f"  as_published      {listed} is as published")
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
    ns_dtype, _ = pick_dtype(config.optim.ns_dtype, ranks.device)
    ops = choose_all(
        config.run.ops,
        ranks.device.type,
        dtype,
        compiles(config, ranks.device),
        operator_sizes(config.model, dtype, ns_dtype),
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
        "vocabulary": vocabulary_line(config.model.vocab_size, dataset.vocab_size),
        "model": f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "batch": f"{config.data.batch_tokens:,} tokens a step, {trainer.accum} pass"
        f"{'es' * (trainer.accum > 1)} of {trainer.local_tokens:,} a rank",
    }
    reasons["memory"] = memory_line(
        model, config, trainer.local_tokens, free_memory(ranks.device)
    )
    if note:
        reasons["environment"] = note
    trainer.say(opening_lines(title, config, dataset, folder.path, reasons))
    return trainer


def train(
    title: Callable[[Config], str],
    config: Config,
    ranks: Ranks,
    folder: RunFolder,
    note: str,
    any_vocabulary: bool = False,
) -> tuple[Config, Dataset, Trainer]:
    """Open the data, build the model, train until the budget is spent.

    Args:
        title: what a run with these settings is, in one line.
        folder: from `claimed_folder`.
        note: which settings the environment gave.
        any_vocabulary: nobody asked for a vocab_size: the model takes the data's.
    """
    going_on = config.run.resume
    dataset = data_again(config, folder.path) if going_on else open_data(config, ranks)
    config = with_dataset(fit_vocabulary(config, dataset, any_vocabulary), dataset)
    trainer = build(title(config), config, ranks, dataset, folder, note)
    try:
        ranks.on_first(lambda: folder.open(config, dataset))
        if config.run.resume:
            resume(trainer, folder)
        else:
            trainer.warm_up()
        if not trainer.schedule.finished(trainer.clock):
            trainer.say_estimate()
        with Interrupt(folder.path, config.recipe) as interrupt:
            trainer.train(interrupt)
    except BaseException:
        if not config.run.resume and not trainer.clock.step:
            folder.discard()
        raise
    return config, dataset, trainer


def resume(trainer: Trainer, folder: RunFolder) -> None:
    """Put the newest checkpoint into the trainer; nothing is compiled if training is over.

    Raises:
        DataError: no checkpoint is whole.
        ConfigError: nothing was trained.
    """
    # Looked at first, outside of the memory that compiling needs.
    state, path = folder.load(torch.device("cpu"))
    if "clock" not in state:
        raise ConfigError(f"{path} holds imported weights: there is no training to resume")
    if not trainer.schedule.finished(Clock(**state["clock"])):
        trainer.warm_up()
    state, path = folder.load(trainer.ranks.device)
    trainer.load_state_dict(state)
    folder.forget_after(trainer.clock.step)
    qat = ", late QAT is on" if trainer.qat_switch else ""
    trainer.say(f"going on from {path}{qat}")


def run(
    config: Config, environment: Mapping[str, str], any_vocabulary: bool = False
) -> dict[str, Any] | None:
    """Train, pack, decode, score, report. Returns the result, None on ranks but the first."""
    started = time.perf_counter()
    ranks = Ranks.start(config.run.device)
    try:
        note = ", ".join(f"{k}={v}" for k, v in environment.items())
        with claimed_folder(config, ranks) as folder:
            config, dataset, trainer = train(
                recipes.title, config, ranks, folder, note, any_vocabulary
            )
            try:
                result = finish(config, ranks, dataset, folder, trainer)
            except KeyboardInterrupt as e:
                raise stopped_after_training(config, folder, e) from e
            folder.check()
            trainer.say(f"done in {format_seconds(time.perf_counter() - started)}")
    finally:
        ranks.stop()
    return result


def stopped_after_training(
    config: Config, folder: RunFolder, stop: KeyboardInterrupt
) -> Interrupted:
    """What a run says that is stopped while it packs or scores."""
    if folder.checkpoints():
        remedy = (
            "training is done and kept; to pack and score it, "
            f"`{resume_command(config.recipe, folder.path)}`"
        )
    else:
        remedy = "no checkpoint was kept (checkpoint_every=0): train again"
    return Interrupted(f"stopped after training: {remedy}", getattr(stop, "exit_code", 130))


@contextmanager
def claimed_folder(config: Config, ranks: Ranks) -> Iterator[RunFolder]:
    """The run folder that rank 0 chose, on every rank; no other run gets it meanwhile."""
    with ExitStack() as stack:
        chosen = [ranks.on_first(lambda: stack.enter_context(RunFolder.choose(config)))]
        if ranks.world > 1:
            torch.distributed.broadcast_object_list(chosen, 0, device=ranks.device)
        yield RunFolder(chosen[0], writes=ranks.first)


def packing_again(config: Config, folder: RunFolder, excess: int) -> str:
    """What is left of a run that is `excess` bytes over its budget, and how to pack that."""
    if not folder.checkpoints():
        return "No checkpoint was kept (checkpoint_every=0): train again"
    line = f"pgolf pack {quote(str(folder.path))} --out {quote(str(folder.artifact))}"
    # A little more than is needed: settings are in the code, whose size counts.
    enough = -(-(config.artifact.budget_bytes + excess) * 101 // 100_000) * 1000
    if recipes.get(config.recipe).contest and enough > CONTEST_BYTES:
        if config.artifact.fit_to_budget:
            return f"The weights are safe in {folder.checkpoints()[-1]}"
        line, enough = f"{line} grid=uniform quantizer=gptq", CONTEST_BYTES
    return (
        f"The weights are safe in {folder.checkpoints()[-1]}: pack them with `{line} "
        f"budget={enough}`"
    )


def finish(
    config: Config, ranks: Ranks, dataset: Dataset, folder: RunFolder, trainer: Trainer
) -> dict[str, Any] | None:
    """Pack, score the live weights and the decoded bytes, write, show and return the result."""
    exported = trainer.take_export()
    model = trainer.model
    dtype, attention = model.compute_dtype, model.backend
    try:
        packed = export(model, config, dataset, ranks, folder.artifact, trainer.say)
    except BudgetError as e:
        raise BudgetError(f"{e}. {packing_again(config, folder, e.excess)}", e.excess) from e
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
    name = dtype_name(dtype)
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
        print(result_table(result | {"recipe": recipes.run_name(config)}))
        print(f"\n{write_report(folder.path)}")
    return result
