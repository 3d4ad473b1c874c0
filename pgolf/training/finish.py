"""What follows training: pack, score the decoded bytes, write and show the result.

No part of a submission's script, which packs and scores in its own way.
"""

from shlex import quote
from typing import Any

import torch

from pgolf import recipes
from pgolf.errors import BudgetError
from pgolf.progress import format_seconds
from pgolf.recipes.recipe import CONTEST_BYTES
from pgolf.report.html import report_line
from pgolf.report.table import result_table
from pgolf.scoring.job import ScoreJob
from pgolf.training.audit import Audit
from pgolf.training.export import export
from pgolf.training.interrupt import Interrupted, resume_command
from pgolf.training.result import write_result
from pgolf.training.session import BuildScript, Session
from pgolf.training.trainer import Trainer


def stopped_after_training(session: Session, stop: KeyboardInterrupt) -> Interrupted:
    """What a run says that is stopped while it packs or scores."""
    folder = session.folder
    if folder.checkpoints():
        remedy = (
            "training is done and kept; to pack and score it, "
            f"`{resume_command(session.config.recipe, folder.path)}`"
        )
    else:
        remedy = "no checkpoint was kept (checkpoint_every=0): train again"
    return Interrupted(f"stopped after training: {remedy}", getattr(stop, "exit_code", 130))


def packing_again(session: Session, excess: int) -> str:
    """What is left of a run that is `excess` bytes over its budget, and how to pack that."""
    config, folder = session.config, session.folder
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
    session: Session, trainer: Trainer, build_script: BuildScript
) -> dict[str, Any] | None:
    """Pack, score the live weights and the decoded bytes, write, show and return the result."""
    config, ranks, folder = session.config, session.ranks, session.folder
    trainer.exchange.gather_weights()
    audit = Audit(trainer) if ranks.first else None
    exported = trainer.take_export()
    idle = audit.warnings(exported) if audit else []
    for line in idle:
        session.say(f"warning: {line}")
    model = trainer.model
    script = ranks.on_first(lambda: build_script(config))
    try:
        packed = export(session, model, script, folder.artifact)
    except BudgetError as e:
        raise BudgetError(f"{e}. {packing_again(session, e.excess)}", e.excess) from e
    reserve = config.schedule.reserve_s
    if packed is not None and 0 < reserve < packed.seconds:
        session.say(
            f"calibration and quantisation took {format_seconds(packed.seconds)}: raise "
            f"reserve_s={reserve:g} for them to be within max_seconds"
        )
    live = None
    if config.eval.score_live:
        with session.phases("live_scoring"):
            live = trainer.score(config.eval.stride, "scoring live")
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # what training has cached is not free to the scoring process
    job = ScoreJob.of(
        folder.artifact, session.dataset, config.eval, ranks, model.compute_dtype,
        "scoring decoded",
    )  # fmt: skip
    with session.phases("scoring"):
        decoded = job.ask().sums.over(ranks)
    result = None
    if packed is not None:
        result = write_result(session, trainer, packed, decoded, live, exported, idle)
        print(result_table(result | {"recipe": recipes.run_name(config)}))
        print(f"\n{report_line(folder.path)}")
    return result
