"""What ranks exchange in a step, and the weights as the forward pass reads them.

One rank owns a matrix: it alone holds its momentum and average, and updates it. Tables and vectors
are small: every rank holds and updates them alike.

    exchange  <- gradients of the published weights            reduce-scatter, each rank its sums
    own       <- gradients of the matrices behind them         through factor, grid and cast
    small     <- all other gradients, norm of own              all-reduce: norm of everything
    published <- own matrices: on their grid, scaled, cast     all-gather, after the update

So no pass casts, packs or quantises a matrix, and of those nothing but what the passes read
travels. In a run of one rank the collectives are nothing, and the rest is the same.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pgolf.model.gpt import GPT
from pgolf.model.masters import Masters
from pgolf.model.matrices import Matrix, cast_all
from pgolf.ops.grad_norm import grad_norm
from pgolf.ops.tensors import compute_dtype
from pgolf.optim.groups import fuses
from pgolf.optim.layout import Layout
from pgolf.ranks import Ranks


class Exchange:
    """Publishes a model's matrices to it, and takes the gradients of a step back.

    Args:
        model: on its device, the same on every rank; from now on it reads the published weights.
        passes: forward and backward passes of a step.
        ops: operator -> implementation, for the optimisers; the reference where none is named.
        limit: what this rank's gradients are clipped to (`local_limit`); 0: they are not.

    Attributes:
        held: names of the parameters that this rank updates, in the model's order. Others are as
            they were when `gather_weights` ran last.
        own_norm: 0-d, of what this rank added to the gradients of matrices in a step, so that it is
            seen whose are not finite; 0 of a rank that is alone.
    """

    def __init__(
        self,
        model: GPT,
        ranks: Ranks,
        passes: int = 1,
        ops: Mapping[str, str] | None = None,
        limit: float = 0.0,
    ):
        self.ranks, self.dtype, self.limit = ranks, model.compute_dtype, limit
        self.norm_impl = (ops or {}).get("grad_norm", "reference")
        # Torch's optimisers take gradients in the parameters' dtype: one cast is for all of them.
        narrow = self.dtype.itemsize < 4
        self.widens = narrow and not fuses(ops or {})
        self.params = dict(model.named_parameters())
        names = {p: name for name, p in self.params.items()}
        matrices = {names[m.weight]: m for m in model.modules() if isinstance(m, Matrix)}
        scales: dict[str, nn.Parameter | None] = dict.fromkeys(matrices)
        units: list[list[str]] = []
        fold = None
        for block in model.blocks:
            of_block = [names[m.weight] for m in block.matrices()]
            q, k, v, *others = of_block
            units += [[q, k, v], *([name] for name in others)]
            fold = block.fold()
            if fold:
                scales |= dict(zip(of_block, fold.scales, strict=True))
        packed = {name for unit in units for name in unit}
        units += [[name] for name in matrices if name not in packed]
        shapes = [{n: tuple(self.params[n].shape) for n in unit} for unit in units]
        self.layout = Layout.of(shapes, ranks.world)
        # Own matrices: name -> first element in this rank's part; with their shapes, `places`.
        part = self.layout.of_rank(ranks.rank)
        self.starts = {n: self.layout.starts[n] - part.start for n in self.layout.owned(ranks.rank)}
        self.places = [*self.starts.values()], [self.layout.shapes[n] for n in self.starts]
        self.own = [matrices[name] for name in self.starts]
        self.fold = fold and fold._replace(scales=[scales[n] for n in self.starts])
        self.held = [n for n in self.params if n in self.starts or n not in matrices]
        self.small = [p for name, p in self.params.items() if name not in matrices]
        self.zeros: dict[torch.dtype, Tensor] = {}
        self.published = self._buffer(self.dtype)
        self.leaves = self._give_leaves(model, matrices, units)
        # Gradients of several passes add up in fp32, which narrow leaves do not.
        self.sums = self._buffer(torch.float32) if passes > 1 and narrow else None
        # What a rank that is alone has of its leaves goes nowhere: it is taken where it is.
        stays = ranks.world == 1 and self.sums is None and not limit and not self.widens
        self.stays = stays and self.norm_impl != "reference"
        self.gradients = self.published.new_empty(0) if self.stays else self._buffer(self.dtype)
        self.own_norm = torch.zeros((), dtype=compute_dtype(self.dtype), device=ranks.device)
        self.passes = 0
        self.cast: list[Tensor] = []
        if Masters:  # (In a script nobody changes weights.)
            folded = self.fold.scales if self.fold else ()
            model.masters = Masters.published(model, self.starts, folded)
        self.masters = model.masters
        self.publish()

    def _give_leaves(
        self, model: GPT, matrices: Mapping[str, Matrix], units: Sequence[Sequence[str]]
    ) -> dict[int, Tensor]:
        """Let the model read `published`; first element -> the view that gathers gradients.

        Args:
            units: four of each block, then single matrices.
        """
        leaves = []
        for first, *others in units:
            start, (rows, columns) = self.layout.starts[first], self.layout.shapes[first]
            rows += sum(self.layout.shapes[name][0] for name in others)
            (view,) = _views(self.published, [start], [(rows, columns)])
            leaves.append(view.detach().requires_grad_())
        left = iter(leaves)
        for block in model.blocks:
            block.published = block.packed(*(next(left) for _ in range(4)))
        for unit, leaf in zip(units[4 * len(model.blocks) :], left, strict=True):
            matrices[unit[0]].published = leaf
        starts = [self.layout.starts[unit[0]] for unit in units]
        return dict(sorted(zip(starts, leaves, strict=True)))

    # --- gradients ----------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradients of a pass that ended, where several have to add up."""
        if self.sums is None:
            return
        self._fill(self.gradients, self._take())
        if self.passes:
            self.sums += self.gradients
        else:
            self.sums.copy_(self.gradients)
        self.passes += 1

    def _take(self) -> dict[int, Tensor]:
        """The gradients of the leaves, by their first elements. They have none then."""
        missing = sum(leaf.grad is None for leaf in self.leaves.values())
        if missing:
            raise ValueError(f"{missing} weights have no gradient: run a backward pass first")
        grads = {start: leaf.grad for start, leaf in self.leaves.items()}
        for leaf in self.leaves.values():
            leaf.grad = None
        return grads

    @torch.no_grad()
    def reduce(self) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """End the passes of a step.

        Returns:
            (gradient of each parameter of `held`, summed over ranks; the norm of all parameters'
            gradients, 0-d). What was gathered is dropped.

        Raises:
            ValueError: there was no backward pass.
        """
        if self.stays:
            published = self._unpacked(self._take())
        else:
            reduced = self._reduced()
            published = _views(reduced, *self.places)
        grads = self._through_the_cast(published)
        own = [grads[m.weight] for m in self.own]
        for p in self.small:
            if p.grad is not None:  # of a factor that is folded in, only its owner knows it
                grads[p] = p.grad
                p.grad = None
        if self.ranks.world == 1 and self.norm_impl != "reference":
            return grads, self._norm(list(grads.values()))
        # Where they are what was summed, one buffer is taken for all of them.
        return grads, self._sum_small(grads, own if self._behind_a_cast() else [reduced])

    def _reduced(self) -> Tensor:
        """This rank's part of the sum over passes and ranks."""
        if self.sums is None:
            self._fill(self.gradients, self._take())
        elif self.passes:
            self.gradients.copy_(self.sums)
        else:
            raise ValueError("no gradients were collected: run a backward pass first")
        self.passes = 0
        if self.ranks.world > 1:
            torch.linalg.vector_norm(self.gradients, dtype=self.own_norm.dtype, out=self.own_norm)
        if self.limit:
            self._clip()
        reduced = self.ranks.reduce_scatter(self.gradients)
        return reduced.float() if self.widens else reduced

    def _unpacked(self, grads: Mapping[int, Tensor]) -> list[Tensor]:
        """Of each own matrix, where the gradients of all leaves are here."""
        views, first = [], 0
        for start, shape in zip(*self.places, strict=True):
            if start in grads:  # packed ones lie behind one another
                first, flat = start, grads[start].reshape(-1)
            views += _views(flat, [start - first], [shape])
        return views

    def _clip(self) -> None:
        """Clip this rank's gradients, before others' are added.

        A matrix counts as the passes read it: scaled, if a factor is folded into it. Gradients are
        shares of a mean over ranks here, and the limit is one of this rank's own mean.
        """
        small = [p.grad for p in self.small if p.grad is not None]
        norm = self.ranks.world * self._norm([self.own_norm[None], *small])
        factor = (self.limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([self.gradients, *small], factor)

    def _behind_a_cast(self) -> list[int]:
        """Which of own matrices have another gradient than what was published of them."""
        scales = self.fold.scales if self.fold else [None] * len(self.own)
        return [
            i
            for i, (m, scale) in enumerate(zip(self.own, scales, strict=True))
            if scale is not None or (m.grid or {}).get("clip_mask")
        ]

    def _through_the_cast(self, published: Sequence[Tensor]) -> dict[nn.Parameter, Tensor]:
        """Gradients of own matrices and of the factors in their rows, from those of the published.

        Through a cast, and a grid that lets all pass, they are the same.
        """
        # The graph of `publish` is still there: weights have not changed since.
        grads = {m.weight: g for m, g in zip(self.own, published, strict=True)}
        if kept := self._behind_a_cast():
            behind = [self.own[i].weight for i in kept]
            if self.fold:
                behind += [scale for i in kept if (scale := self.fold.scales[i]) is not None]
            outs = [self.cast[i] for i in kept]
            into = [grads[self.own[i].weight].to(self.dtype) for i in kept]
            grads |= dict(zip(behind, torch.autograd.grad(outs, behind, into), strict=True))
        self.cast = []
        return grads

    def _sum_small(self, grads: dict[nn.Parameter, Tensor], own: list[Tensor]) -> Tensor:
        """Sum what every rank holds over ranks; the norm of all gradients."""
        pieces = [
            grads[p].reshape(-1).float() if p in grads else self._zeros(p.numel(), torch.float32)
            for p in self.small
        ]
        # A place of each rank for the norm of its own: the sum has the norm of everything.
        norms = [self._zeros(1, torch.float32)] * self.ranks.world
        if self.own:
            norms[self.ranks.rank] = self._norm(own).reshape(1).float()
        flat = torch.cat([*pieces, *norms])
        self.ranks.all_reduce(flat)
        if self.ranks.world > 1:
            for p, g in zip(self.small, flat.split([*map(len, pieces), len(norms)]), strict=False):
                grads[p] = g.view_as(p)
        return self._norm([flat])

    def _norm(self, grads: list[Tensor]) -> Tensor:
        if self.norm_impl != "reference":
            return grad_norm(grads, self.norm_impl)[0]
        # In fewer launches than the operator's own reference takes.
        wide = compute_dtype(grads[0].dtype)
        if len(grads) == 1:
            return torch.linalg.vector_norm(grads[0], dtype=wide)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=wide)))

    # --- weights ------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self) -> None:
        """Let the model read the weights as they are now."""
        part = self.published[self.layout.of_rank(self.ranks.rank)]
        narrow, plain = self.dtype.itemsize < 4, all(m.grid is None for m in self.own)
        if self.fold and all(m.weight.dtype != self.dtype for m in self.own):
            with torch.enable_grad():
                into = _views(part, *self.places)
                self.cast = cast_all(self.own, self.dtype, self.fold, into) if self.own else []
        elif narrow and plain and self.fold is None:
            wide = torch.empty_like(part, dtype=torch.float32)
            self._fill(wide, self._placed(m.weight for m in self.own))
            part.copy_(wide)  # all of them in one cast
        else:
            with torch.enable_grad():
                self.cast = cast_all(self.own, self.dtype, self.fold) if self.own else []
            self._fill(part, self._placed(self.cast))
        self.ranks.all_gather(self.published)
        if self.masters:
            self.masters.note()

    def _placed(self, tensors: Iterable[Tensor]) -> dict[int, Tensor]:
        """Of own matrices, by their first elements in this rank's part."""
        return dict(zip(self.starts.values(), tensors, strict=True))

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """fp32 tensors of own matrices from all ranks, in the model's order.

        Args:
            tensors: by name, of parameters of `held`; of small ones any rank's are everyone's. A
                matrix whose owner has none, as before the first step, is zero.
        """
        if self.ranks.world == 1:
            return dict(tensors)
        whole = self._buffer(torch.float32)
        part = whole[self.layout.of_rank(self.ranks.rank)]
        self._fill(part, {start: tensors[n] for n, start in self.starts.items() if n in tensors})
        self.ranks.all_gather(whole)
        places = self.layout.starts.values(), self.layout.shapes.values()
        gathered = dict(zip(self.layout.starts, _views(whole, *places), strict=True)) | {
            n: t for n, t in tensors.items() if n not in self.layout.starts
        }
        return {n: gathered[n] for n in self.params if n in gathered}

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Bring the matrices of other ranks up to date."""
        if self.ranks.world == 1:
            return
        weights = self.gather({n: self.params[n].detach() for n in self.held})
        others = [n for n in self.layout.starts if n not in self.held]
        torch._foreach_copy_([self.params[n] for n in others], [weights[n] for n in others])

    # --- buffers ------------------------------------------------------------------------------

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """A part for each rank, of zeros."""
        whole = self.layout.part * self.layout.world
        return torch.zeros(whole, dtype=dtype, device=self.ranks.device)

    def _fill(self, flat: Tensor, pieces: Mapping[int, Tensor]) -> None:
        """Write tensors from first elements on, in their order, and zeros between.

        One launch, if all are of one dtype.
        """
        ends = [start + t.numel() for start, t in pieces.items()]
        gaps = [b - a for a, b in zip([0, *ends], [*pieces, flat.numel()], strict=True)]
        written = [t.reshape(-1) for t in pieces.values()]
        padded = [self._zeros(gaps[0], flat.dtype)]
        for t, gap in zip(written, gaps[1:], strict=True):
            padded += [t, self._zeros(gap, flat.dtype)]
        torch.cat([t for t in padded if t.numel()], out=flat)

    def _zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many zeros, which are kept: filling them anew would be a launch each time."""
        kept = self.zeros.get(dtype)
        if kept is None or kept.numel() < count:
            kept = self.zeros[dtype] = self.published.new_zeros(count, dtype=dtype)
        return kept[:count]


def _views(flat: Tensor, starts: Iterable[int], shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    """Matrices in a flat buffer."""
    return [
        flat[start : start + rows * columns].view(rows, columns)
        for start, (rows, columns) in zip(starts, shapes, strict=True)
    ]
