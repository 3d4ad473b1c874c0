"""What a run says of its steps: the contest's console lines, and rows of metrics.jsonl."""

from collections.abc import Mapping

from pgolf.optim.schedule import Clock, Schedule
from pgolf.progress import format_seconds
from pgolf.scoring.windows import Sums
from pgolf.training.pace import Step
from pgolf.training.session import Session


class StepLog:
    """Says it on the first rank."""

    def __init__(self, session: Session, schedule: Schedule):
        self.say, self.row, self.schedule = session.say, session.folder.log, schedule

    def event(self, clock: Clock, text: str) -> None:
        """Something about the step that begins after `clock`.

        Under the number of that step: a run that is resumed before it writes the line again.
        """
        step = clock.step + 1
        self.say(f"step:{step} {text}")
        self.row(kind="event", text=text, **{**vars(clock), "step": step})

    def step(self, step: Step, since: Mapping[str, float]) -> None:
        """A step that is over; `since` is more for its row."""
        c = step.clock
        ms = 1000 * c.seconds / c.step
        left = self.schedule.steps_left(c)
        self.say(
            f"step:{c.step}/{c.step + left} train_loss:{step.loss:.4f} "
            f"train_time:{1000 * c.seconds:.0f}ms step_avg:{ms:.2f}ms "
            f"eta:{format_seconds(left * ms / 1000)}"
        )
        self.row(
            kind="train",
            **vars(c),
            loss=step.loss,
            grad_norm=step.norm,
            lr_scale=step.lr_scale,
            momentum=step.momentum,
            ms_per_step=ms,
            **since,
        )

    def validation(self, clock: Clock, sums: Sums) -> None:
        """A score of the weights as they were after `clock`."""
        last = clock.step + self.schedule.steps_left(clock)
        self.say(
            f"step:{clock.step}/{last} val_loss:{sums.loss:.4f} val_bpb:{sums.bpb:.4f} "
            f"train_time:{1000 * clock.seconds:.0f}ms"
        )
        self.row(kind="val", **vars(clock), loss=sums.loss, bpb=sums.bpb)
