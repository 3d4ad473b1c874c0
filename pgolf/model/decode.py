"""One more token at a time: the model with key/value caches, and sampling with it.

A step runs the model's own `trunk` on one position of each sequence; only attention is another,
over the cached keys and values, and the first embedding comes from the last three tokens, which is
as far as bigrams and SmearGate look back. Nothing in a step waits for the device or depends on how
many tokens are cached, but for the number of cached positions that are read: one that is compiled
takes SPANS different numbers at most, the cached positions behind the token being masked.
Shapes: B sequences, L cached positions, H query heads, G key/value heads, d head width, V logits.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.model.gpt import GPT
from pgolf.ops.compile import compile_graph
from pgolf.progress import Progress

SPANS = 8  # how many numbers of cached positions compiled steps are made for
WINDOW = 3  # last tokens on which the first embedding of the last one depends


class Decoder:
    """The caches of B sequences, which grow by one token a step.

    Args:
        model: best a `frozen_copy`, which casts no weights in a step.
        batch: B.
        length: L, the most tokens of a sequence; at most the model's `max_length`.
        compiled: whether a step goes through torch.compile.
    """

    def __init__(self, model: GPT, batch: int, length: int, compiled: bool = False):
        c, device = model.config, model.rope_cos.device
        if not 1 <= length <= model.rope_cos.size(0):
            raise ConfigError(
                f"a cache for {length} tokens: the model has positions for 1 to "
                f"{model.rope_cos.size(0)}"
            )
        self.model, self.length = model, length
        self.stride = -(-length // SPANS) if compiled else 1
        # Zeros, not any memory: a NaN in a value that is masked would still come through.
        # A tensor for each layer, so that a compiled step writes into it and copies none.
        shape = (batch, c.kv_heads, length, c.dim // c.heads)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=model.compute_dtype, device=device) for _ in model.blocks]
            for _ in range(2)
        )
        self.slots = torch.arange(length, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.begins = torch.zeros((batch, 1), dtype=torch.int64, device=device)  # of documents
        self.window = torch.empty((batch, 0), dtype=torch.int64, device=device)
        self.used = 0
        self._compiled = (
            compile_graph(self._step, model.ops, device) if compiled else None
        )

    @property
    def full(self) -> bool:
        """Whether there is no room for one more token."""
        return self.used == self.length

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Start over with tokens ids (B, T), T >= 1, in one pass: logits (B, V) after the last.

        Raises:
            ConfigError: they are more than the caches hold.
        """
        time = ids.size(1)
        self._check(time)
        rope = self.model.rope_cos[:time], self.model.rope_sin[:time]
        fill = partial(self._fill, self.model.borders(ids))
        x = self.model.trunk(ids, self.model.embed(ids), rope, fill)
        starts = ids == self.model.config.bos_id
        self.begins[:] = (starts * self.slots[:time]).amax(1, keepdim=True)
        self.position.fill_(time)
        self.window, self.used = ids[:, -WINDOW:].contiguous(), time
        return self.model.logits(x[:, -1])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Append one token to each sequence, ids (B,): logits (B, V) after it.

        Raises:
            ConfigError: the caches are full.
        """
        self._check(self.used + 1)
        span = min(-(-(self.used + 1) // self.stride) * self.stride, self.length)
        whole = self.window.size(1) == WINDOW  # the first steps have shapes of their own
        step = self._compiled if self._compiled and whole else self._step
        logits, self.window = step(self.window, ids, span)
        self.used += 1
        return logits

    def _check(self, tokens: int) -> None:
        if tokens > self.length:
            raise ConfigError(
                f"{tokens} tokens do not fit into a cache for {self.length}: make it longer, or go "
                "on from fewer of the last tokens"
            )

    def _fill(
        self, borders: Tensor | None, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        self.keys[layer][:, :, : k.size(1)] = k.transpose(1, 2)
        self.values[layer][:, :, : v.size(1)] = v.transpose(1, 2)
        return self.model.attend(layer, q, k, v, borders)

    def _step(self, window: Tensor, ids: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """(logits, the next window); reads the first `span` cached positions."""
        model, position = self.model, self.position
        window = torch.cat([window[:, 1 - WINDOW :], ids[:, None]], dim=1)
        hidden = torch.zeros(1, span, dtype=model.compute_dtype, device=window.device)
        hidden.masked_fill_(self.slots[:span] > position, -torch.inf)
        if model.config.documents:
            begins = self.begins.masked_fill_(ids[:, None] == model.config.bos_id, position[0])
            hidden = hidden.masked_fill(self.slots[:span] < begins, -torch.inf)[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys.index_copy_(2, position, k.transpose(1, 2))
            values.index_copy_(2, position, v.transpose(1, 2))
            # The H / G queries of a key/value head stand side by side, as if they were positions.
            together = q.reshape(q.size(0), k.size(2), -1, q.size(3))
            y = F.scaled_dot_product_attention(
                together, keys[:, :, :span], values[:, :, :span], attn_mask=hidden
            )
            return y.reshape(q.shape)

        x0 = model.embed(window)[:, -1:]
        rope = model.rope_cos[position], model.rope_sin[position]
        x = model.trunk(window[:, -1:], x0, rope, attend)
        self.position += 1
        return model.logits(x[:, 0]), window


def pick(logits: Tensor, temperature: float, chance: Tensor) -> Tensor:
    """Tokens (B,) drawn from softmax(logits / temperature) by inversion.

    Args:
        logits: (B, V).
        temperature: 0 takes the most likely token.
        chance: (B,) fp64, uniform in [0, 1): the same one gives the same token.
    """
    if not temperature:
        return logits.argmax(-1)
    ends = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    drawn = torch.searchsorted(ends, chance[:, None] * ends[:, -1:], right=True)
    return drawn[:, 0].clamp(max=logits.size(1) - 1)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    count: int,
    length: int,
    pieces: int,
    temperature: float = 0.0,
    chances: Tensor | None = None,
    progress: str = "",
) -> Tensor:
    """Continue B sequences by `count` tokens each, all of them in one batch.

    The context is all tokens so far up to `length`. When it is full, it starts over with its last
    half, so it is between a half of `length` and `length` tokens from then on.

    Args:
        model: best a `frozen_copy`.
        prompt: (B, T) ids, T >= 1.
        pieces: size of the tokenizer; the model may have more ids than it.
        temperature: 0 takes the most likely token.
        chances: (B, count) fp64 for `pick`; None with temperature 0.
        progress: label of the progress line; '' shows none.

    Returns:
        (B, T + count) ids.
    """
    decoder = Decoder(model, prompt.size(0), length)
    ids = F.pad(prompt, (0, count))
    with Progress(progress, count, "tokens", enabled=bool(progress)) as bar:
        for i, at in enumerate(range(prompt.size(1), ids.size(1))):
            if decoder.used and not decoder.full:
                logits = decoder.step(ids[:, at - 1])
            else:
                kept = max(length // 2, 1) if decoder.used else length
                logits = decoder.read(ids[:, max(at - kept, 0) : at])
            chance = chances[:, i] if temperature else None
            ids[:, at] = pick(logits[:, :pieces], temperature, chance)
            bar.update()
    return ids
