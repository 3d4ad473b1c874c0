"""`pgolf train`: from a configuration to a scored artifact."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from pgolf import recipes
from pgolf.config import Config
from pgolf.data.held_out import check_held_out
from pgolf.data.loader import Loader
from pgolf.data.shards import load_validation
from pgolf.data.tokenizer import load_tokenizer
from pgolf.device import pick_dtype
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.gpt import operator_sizes
from pgolf.model.init import init_weights
from pgolf.ops.choose import choose_all, with_attention
from pgolf.optim.schedule import Clock
from pgolf.progress import format_seconds
from pgolf.scoring.bpb import ByteTable
from pgolf.training import facts
from pgolf.training.compiling import compiled_once, warm_up
from pgolf.training.estimate import free_memory, memory_line
from pgolf.training.failure_report import report_failure
from pgolf.training.finish import finish, stopped_after_training
from pgolf.training.graphs import captures, replays
from pgolf.training.handshake import alike
from pgolf.training.interrupt import Interrupt
from pgolf.training.joining import exchange_once, join
from pgolf.training.mirrors import mirrored
from pgolf.training.pace import frozen_objects
from pgolf.training.passes import compiles, slice_tokens
from pgolf.training.phases import Phases
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import BuildScript, Session, claimed_folder, open_session
from pgolf.training.trainer import Trainer


def vocabulary_line(rows: int, pieces: int) -> str:
    """What the token table has, and how much of it no text can reach."""
    unused = f", {rows - pieces:,} of them unused: vocab_size={pieces} is enough" * (rows > pieces)
    return f"{rows:,} rows for {pieces:,} pieces{unused}"


def opening_lines(title: str, session: Session, reasons: Mapping[str, str]) -> str:
    """What a run says before it starts: what it is, what limits it, what counts."""
    config, dataset = session.config, session.dataset
    s, lines = config.schedule, []
    limits = [f"{s.max_seconds:g} s"] if s.max_seconds else []
    limits += [f"{s.max_tokens:,} tokens"] if s.max_tokens else []
    limits += [f"{s.max_steps:,} steps"] if s.max_steps else []
    lines.append(title)
    lines.append(f"  run folder      {session.folder.path}")
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
        lines.append(f"  as_published    {listed} is as published")
    return "\n".join(lines)


def build_parts(session: Session) -> tuple[Any, ...]:
    """What a trainer needs, as far as a rank can make it alone.

    Returns:
        Compute dtype, why that, operator -> `Choice`, model, loader, validation tokens (N + 1,),
        table of their bytes.
    """
    config, ranks, dataset = session.config, session.ranks, session.dataset
    dtype, why = pick_dtype(config.run.compute_dtype, ranks.device)
    ns_dtype, _ = pick_dtype(config.optim.ns_dtype, ranks.device)
    ops = choose_all(
        with_attention(config.run.ops, config.run.attention),
        ranks.device.type,
        dtype,
        compiles(config, ranks.device),
        operator_sizes(config.model, dtype, ns_dtype),
    )
    model = GPT(
        config.model,
        dtype,
        config.data.seq_len,
        {name: choice.impl for name, choice in ops.items()},
    )
    init_weights(model, config.run.seed)
    val = load_validation(
        dataset.folder, config.model.vocab_size, config.data.seq_len, config.eval.val_tokens
    )
    table = ByteTable(load_tokenizer(dataset.tokenizer_path), config.model.vocab_size)
    loader = Loader(
        dataset.train_shards,
        ranks,
        config.model.vocab_size,
        config.data.seq_len,
        slice_tokens(config),
        config.data.order,
        config.run.seed,
        model.most_documents(config.data.seq_len),
    )
    return dtype, why, ops, model.to(ranks.device), loader, val, table


def build(session: Session, title: str, note: str = "") -> Trainer:
    """The model with its initial weights and the trainer around it; says what was chosen.

    Args:
        title: what the run is, in one line.
        note: which settings the environment gave.
    """
    config, ranks, dataset = session.config, session.ranks, session.dataset
    if ranks.device.type == "cuda":
        # Matmuls that stay in fp32 may use TF32, as in the published scripts.
        torch.set_float32_matmul_precision("high")
    dtype, why, ops, model, loader, val, table = alike(
        ranks,
        lambda: build_parts(session),
        lambda parts: facts.hardware(ranks.device, parts[0], parts[3].ops),
    )
    ranks.broadcast(model.parameters())
    trainer = Trainer(session, model, loader, val, table, model.ops)
    reasons = {
        "device": f"{ranks.device}, {ranks.world} rank{'s' * (ranks.world > 1)}",
        "compute": f"{str(dtype).removeprefix('torch.')} ({why})",
        **{name: f"{choice.impl} ({choice.reason})" for name, choice in ops.items()},
        "vocabulary": vocabulary_line(config.model.vocab_size, dataset.vocab_size),
        "model": f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "batch": f"{config.data.batch_tokens:,} tokens a step, {trainer.accum} pass"
        f"{'es' * (trainer.accum > 1)} of {trainer.local_tokens:,} a rank",
    }
    reasons["memory"] = memory_line(
        model, config, trainer.local_tokens, free_memory(ranks.device), replays(trainer)
    )
    if note:
        reasons["environment"] = note
    session.say(opening_lines(title, session, reasons))
    return trainer


def train(session: Session, title: str, note: str = "") -> Trainer:
    """Train a new model until the budget is spent; the arguments are those of `build`."""
    config, ranks, folder = session.config, session.ranks, session.folder
    trainer = build(session, title, note)
    try:
        with captures(trainer) as capturing:
            ranks.on_first(lambda: folder.open(config, session.dataset))
            if config.run.resume:
                resume(trainer, folder)
            else:
                warm_up(trainer)
            if not trainer.schedule.finished(trainer.clock):
                trainer.say_estimate()
            with (
                Interrupt(folder.path, config.recipe) as interrupt,
                compiled_once(trainer),
                capturing,
                frozen_objects(),
            ):
                with session.phases("training"):
                    trainer.train(interrupt)
    except BaseException:
        if not config.run.resume and not trainer.clock.step:
            folder.discard()
        raise
    return trainer


def resume(trainer: Trainer, folder: RunFolder) -> None:
    """Put the newest checkpoint into the trainer; nothing is compiled if training is over.

    Raises:
        DataError: no checkpoint is whole.
        ConfigError: nothing was trained.
        TrainingError: ranks see different checkpoints as the newest that is whole.
    """
    ranks = trainer.session.ranks
    # Looked at first, outside of the memory that compiling needs.
    state, path = alike(
        ranks,
        lambda: folder.load(torch.device("cpu")),
        lambda loaded: {"checkpoint": folder.described(loaded[1])},
        f"let all ranks see the same {folder.path}, or copy checkpoints/ of rank 0's",
    )
    if "clock" not in state:
        raise ConfigError(f"{path} holds imported weights: there is no training to resume")
    if not trainer.schedule.finished(Clock(**state["clock"])):
        warm_up(trainer)
    state, path = folder.load(ranks.device)
    trainer.load_state_dict(state)
    trainer.session.phases.add(state.get("phases", {}))
    folder.forget_after(trainer.clock.step)
    qat = ", late QAT is on" if trainer.qat.on else ""
    trainer.session.say(f"going on from {path}{qat}")


def run(
    config: Config,
    environment: Mapping[str, str],
    any_vocabulary: bool,
    build_script: BuildScript,
) -> dict[str, Any] | None:
    """Train, pack, decode, score, report. Returns the result, None on ranks but the first.

    Args:
        environment: settings that the environment gave.
        any_vocabulary: as for `open_session`.
        build_script: what makes the code that is counted, of the settings.
    """
    started, phases = time.perf_counter(), Phases()
    ranks = join(config.run.device)
    note = ", ".join(f"{k}={v}" for k, v in environment.items())
    with report_failure(ranks, config.recipe) as folders:
        alike(ranks, lambda: config, facts.software)
        exchange_once(ranks)
        with claimed_folder(config, ranks) as folder, mirrored(config, ranks, folder):
            folders.append(folder)

            def opened() -> Session:
                session = open_session(config, ranks, folder, any_vocabulary, phases)
                allow = config.data.held_out == "allow"
                if ranks.first and (leak := check_held_out(session.dataset, allow)):
                    print(f"warning: {leak}", flush=True)
                return session

            session = alike(ranks, opened, facts.data)
            trainer = train(session, recipes.title(session.config), note)
            try:
                with ranks.patient(trainer.clock.step, phase="packing and scoring"):
                    result = finish(session, trainer, build_script)
            except KeyboardInterrupt as e:
                raise stopped_after_training(session, e) from e
            folder.check()
            session.say(f"done in {format_seconds(time.perf_counter() - started)}")
    return result
