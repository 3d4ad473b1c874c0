"""A step as CUDA graphs: the host starts three of them instead of some hundred kernels.

    publishing   weights as the passes read them, with the all-gather
    pass         forward and backward of a micro-step; a second one adds to what the first left
    update       reduce-scatter, norm, optimisers

A graph is the work of one eager call, with the addresses and the numbers that it had. So what
changes from turn to turn is in tensors that the host fills before: tokens, and the optimisers'
rates, the average's among them. Late QAT is a switch on the device, SWA's snapshots are taken
between turns, and no shape changes. The publishing graph is captured first and has to run first:
the update goes back through it. They are captured once a run's state is there, whose tensors stay
where they are, and a step of theirs is compared with an eager one.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.ops.multi_tensor import COLUMNS
from pgolf.optim.groups import fuses
from pgolf.progress import format_seconds
from pgolf.ranks import Ranks
from pgolf.training.handshake import gathered
from pgolf.training.trainer import Trainer

# Where kernels add in no fixed order two eager steps differ as well: a replayed one may be so many
# times as far from the first as the second is, but never by this part of what a tensor moves.
TIMES, PART = 4, 0.5


class Capture:
    """Makes graphs that share a pool of memory.

    Until `close` all work is on a stream of its own: compiled passes keep the nodes that take their
    gradients, with the stream of the first pass, and a capture must not touch the default one.
    """

    def __init__(self):
        self.before = torch.cuda.current_stream()
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.stream.wait_stream(self.before)
        torch.cuda.set_stream(self.stream)

    def close(self) -> None:
        """Go back to the stream before."""
        self.before.wait_stream(self.stream)
        torch.cuda.set_stream(self.before)

    def __call__(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of a call, and what that returned, filled in by each replay.

        Raises:
            RuntimeError: the call did what no graph can hold.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # A thread of NCCL's own asks about its events all the time.
            with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
                return graph, work()
        except RuntimeError:
            # Where CUDA gave the capture up, torch's allocator still takes it for one.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            raise


class Graphs:
    """The graphs of a trainer's step.

    Raises:
        RuntimeError: a capture failed, on any rank; says which and why. The trainer goes on eagerly
            after `forget_passes`.
    """

    def __init__(self, trainer: Trainer, capture: Capture):
        self.trainer = trainer
        self.optimizers, self.update = trainer.optimizers, trainer.optimizers.fused.update
        cursor = trainer.loader.state_dict()
        # Where passes find their tokens, and the update the step's numbers.
        numbers = trainer.optimizers.numbers(0.0, 0.0)
        batch = trainer.loader.next_batch(trainer.local_tokens, numbers)
        self.batch = [torch.zeros_like(t) for t in batch]
        self.numbers = torch.zeros_like(trainer.loader.carried)
        trainer.loader.load_state_dict(cursor)

        def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
            result, why = None, ""
            try:
                result = capture(work)
            except RuntimeError as e:
                why = f"the capture failed: {_cause(e)}"
            # A rank that has no graph must not leave the others alone in their collectives.
            if why := _first_reason(trainer.ranks, why):
                raise RuntimeError(why)
            return result

        self.publishing, _ = captured(trainer.exchange.publish)
        first, self.loss = captured(self._pass)
        self.passes = [first]
        if trainer.accum > 1:
            self.passes.append(captured(self._further_pass)[0])
        self.updating, (self.gradients, self.norm) = captured(self._update)
        self.zeros = dict(trainer.exchange.zeros)  # graphs read them, and it may take larger ones
        self.publish()

    def _pass(self) -> Tensor:
        return self.trainer.passes(1, batch=self.batch)

    def _further_pass(self) -> None:
        self.loss += self._pass()

    def _update(self) -> tuple[dict, Tensor]:
        reduced = self.trainer.exchange.reduce()
        scalars = self.numbers.view(-1, len(COLUMNS))
        self.update(*reduced, scalars, self.optimizers.averages)
        return reduced

    def publish(self) -> None:
        """`Exchange.publish`, which a replayed update can go back through."""
        self.publishing.replay()
        if self.trainer.exchange.masters:
            self.trainer.exchange.masters.note()

    def step(
        self, lr_scale: float, momentum: float, average_rate: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """`Trainer.step`; the results are overwritten by the next one."""
        trainer, loader = self.trainer, self.trainer.loader
        trainer.model.check_published()
        rates = lr_scale, momentum, average_rate
        numbers = self.optimizers.numbers(*rates)
        for n in range(trainer.accum):
            torch._foreach_copy_(self.batch, loader.next_batch(trainer.local_tokens, numbers))
            self.numbers.copy_(loader.carried)
            self.passes[n > 0].replay()
        # The host's part as it is; what it starts on the device is the graph.
        self.optimizers.fused.update = lambda *args: self.updating.replay()
        self.optimizers.step(self.gradients, self.norm, *rates, self.numbers)
        del self.optimizers.fused.update
        self.publish()
        return self.loss, self.norm

    def release(self) -> None:
        """Give up the graphs; those of NCCL's work must not outlive its group."""
        for graph in (self.updating, *reversed(self.passes), self.publishing):
            graph.reset()


def forget_passes(trainer: Trainer) -> None:
    """Let the next step be an eager one, whatever a capture left behind."""
    for leaf in (*trainer.exchange.leaves.values(), *trainer.model.parameters()):
        leaf.grad = None
    trainer.exchange.passes = 0
    trainer.exchange.publish()


class Trial:
    """Steps from one state, that of the trainer, which `restore` puts back."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        fused = trainer.optimizers.fused
        named = {n: p.detach() for n, p in trainer.model.named_parameters()}
        for kind, tensors in (
            ("momentum", fused.momenta), ("first moment", fused.exp_avgs),
            ("second moment", fused.exp_avg_sqs), ("average", trainer.optimizers.averages),
        ):  # fmt: skip
            named |= {f"{kind} {i}": t for i, t in enumerate(tensors)}
        self.state = named | {"published weights": trainer.exchange.published}
        self.before = {n: t.clone() for n, t in self.state.items()}
        self.cursor, self.count = trainer.loader.state_dict(), fused.count

    def restore(self, publish: Callable[[], None]) -> None:
        for name, t in self.state.items():
            t.copy_(self.before[name])
        self.trainer.loader.load_state_dict(self.cursor)
        self.trainer.optimizers.fused.count = self.count
        publish()

    def outcome(self, publish: Callable, step: Callable, *rates: float) -> dict[str, Tensor]:
        """What a step makes of the state, its loss and norm."""
        self.restore(publish)
        loss, norm = step(*rates)
        return {n: t.clone() for n, t in (self.state | {"loss": loss, "norm": norm}).items()}

    def distances(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
        """By tensor, how far two outcomes are apart, as a part of what the first moved it."""
        parts = []
        for name, t in one.items():
            begin = self.before[name].double() if name in self.before else 0.0
            apart = torch.linalg.vector_norm(t.double() - other[name].double())
            moved = torch.linalg.vector_norm(t.double() - begin)
            parts.append(torch.where(apart == 0, apart, apart / moved))
        return dict(zip(one, torch.stack(parts).tolist(), strict=True))

    def verdict(self, eager: list[dict[str, Tensor]], replayed: dict[str, Tensor]) -> str:
        """What is wrong with a replayed step, '' if nothing.

        Args:
            eager: outcomes of two.
        """
        limit = min(TIMES * max(self.distances(*eager).values()), PART)
        distances = self.distances(eager[0], replayed)
        name = max(distances, key=lambda n: (distances[n] != distances[n], distances[n]))
        if distances[name] <= limit:
            return ""
        much = f"{distances[name]:.2g} of what it moves, and may by {limit:.2g}"
        return f"in a replayed step {name} differs from an eager one's by {much}"


def _made(trainer: Trainer, capture: Capture) -> tuple[Graphs | None, str]:
    """Graphs that do what the eager step does, or None and why, on every rank; the state stays."""
    trial, graphs, why = Trial(trainer), None, ""
    rates, publish = (1.0, 0.9, 0.5), trainer.exchange.publish
    eager = [trial.outcome(publish, trainer.step, *rates) for _ in range(2)]
    # A number that is captured is another one than that of the step that is compared.
    trial.outcome(publish, trainer.step, 0.5, 0.8, 0.25)
    trial.restore(publish)
    try:
        graphs = Graphs(trainer, capture)
    except RuntimeError as e:
        why = str(e)
    if graphs:
        why = trial.verdict(eager, trial.outcome(graphs.publish, graphs.step, *rates))
        trial.restore(graphs.publish)
        why = _first_reason(trainer.ranks, why)
        if not why:
            return graphs, ""
        graphs.release()
    forget_passes(trainer)
    graphs = None
    gc.collect()  # what was captured, and its memory
    torch.cuda.empty_cache()
    return None, why


def _cause(error: BaseException) -> str:
    """What went wrong first, a line of it: the end of a capture that is lost is an error too."""
    while error.__context__:
        error = error.__context__
    return str(error).splitlines()[0]


def _first_reason(ranks: Ranks, why: str) -> str:
    """What the first rank that has a reason says, on every rank; '' if none has."""
    reasons = enumerate(gathered(ranks, why)) if ranks.world > 1 else [(0, why)]
    return next((f"rank {r}: {w}" if ranks.world > 1 else w for r, w in reasons if w), "")


def obstacle(trainer: Trainer) -> str:
    """Why there can be no graphs, or ''."""
    if trainer.ranks.device.type != "cuda":
        return f"graphs need CUDA, and this runs on {trainer.ranks.device}"
    if not fuses(trainer.ops):
        return "graphs need kernels for the optimisers' step: choose them in ops"
    return ""


def replays(trainer: Trainer) -> bool:
    """Whether graphs=... and the run allow graphs.

    Raises:
        ConfigError: graphs=true, and there can be none.
    """
    wanted, reason = trainer.config.run.graphs, obstacle(trainer)
    if wanted == "true" and reason:
        raise ConfigError(f"graphs=true: {reason}; or leave it at graphs=auto")
    return wanted != "false" and not reason


@contextmanager
def captures(trainer: Trainer) -> Iterator[AbstractContextManager[None]]:
    """All passes of a run, from the first one on, however it ends.

    Yields:
        A block in which steps are replayed, where they can be.

    Raises:
        ConfigError: graphs=true, and there can be none; at once.
    """
    if not replays(trainer):
        yield nullcontext()
        return
    capture = Capture()
    try:
        yield _captured(trainer, capture)
    finally:
        capture.close()


@contextmanager
def _captured(trainer: Trainer, capture: Capture) -> Iterator[None]:
    eager, graphs = (trainer.step, trainer.exchange.publish), None
    try:
        if not trainer.schedule.finished(trainer.clock):
            began = time.perf_counter()
            with trainer.session.phases("warm_up"):
                graphs, why = _made(trainer, capture)
            took = format_seconds(time.perf_counter() - began)
            made = f"{2 + len(graphs.passes)} in {took}" if graphs else f"off, {why}"
            trainer.say(f"graphs: {made}")
        if graphs:
            trainer.step, trainer.exchange.publish = graphs.step, graphs.publish
        yield
    finally:
        trainer.step, trainer.exchange.publish = eager
        if graphs:
            graphs.release()  # nothing else: other ranks may be gone
