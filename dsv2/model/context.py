"""What a forward step is told besides the weights: which rows belong to which sequence, and what is cached.

Tokens are packed `[T, ...]` everywhere. A training step, a prefill and a decode step differ in their `Context` only.
This room does not page memory or schedule requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2.config import ModelConfig
from dsv2.config.counts import kv_elements_per_token


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of the packed tokens: consecutive tokens of one sequence, after `past` cached ones."""

    start: int
    stop: int
    past: int = 0
    slot: int = 0

    @property
    def num_new(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Routing:
    """What one MoE layer decided: softmax over all experts [T, E] fp32, chosen experts [T, A], gates [T, A] fp32."""

    scores_TE: Tensor
    experts_TA: Tensor
    gates_TA: Tensor


@dataclass(slots=True)
class Context:
    """`positions_T` int64; `segments` tile the rows in order. `absorb` selects MLA's absorbed form (section 2.1.2).

    Every MoE layer appends to `routings` where a list is given; balance losses and load statistics read it.
    """

    positions_T: Tensor
    segments: tuple[Segment, ...]
    cache: Cache | None = None
    absorb: bool = False
    routings: list[Routing] | None = field(default=None, repr=False)

    @staticmethod
    def packed(cu_seqlens: Sequence[int], device: torch.device | str = "cpu", absorb: bool = False) -> Context:
        """Whole documents side by side: document i is rows cu_seqlens[i]:cu_seqlens[i+1]; none sees another."""
        bounds = [int(b) for b in cu_seqlens]
        if bounds[:1] != [0] or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds[:8]}")
        spans = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        return Context(_positions([b - a for a, b in spans], [0] * len(spans), device), _segments(spans), None, absorb)


class Cache:
    """Keys and values of sequences, contiguous per sequence: one tensor [slots, capacity, X] a layer.

    With MLA a token's X elements are the normalised latent (C) and the rotated shared key (R); otherwise its keys
    and values. `lengths[i]` counts the tokens of slot i.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        num_slots: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_slots < 1 or capacity < 1:
            raise ValueError(f"cache needs at least one slot and one token, got {num_slots} x {capacity}")
        width = kv_elements_per_token(cfg) // cfg.num_layers
        shape = (num_slots, capacity, width)
        self.layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(cfg.num_layers)]
        self.capacity = capacity
        self.lengths = [0] * num_slots

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.layers)

    def extend(self, num_new: Sequence[int], absorb: bool = False) -> Context:
        """Reserve `num_new[i]` tokens in slot i and return the context of the step that fills them.

        Raises ValueError, with nothing reserved, unless there is one count a slot and each fits.
        """
        if len(num_new) != len(self.lengths):
            raise ValueError(f"{len(num_new)} counts for {len(self.lengths)} slots")
        for slot, (length, new) in enumerate(zip(self.lengths, num_new, strict=True)):
            if new < 0:
                raise ValueError(f"slot {slot}: num_new={new} must not be negative")
            if length + new > self.capacity:
                raise ValueError(f"slot {slot}: {length} + {new} tokens exceed the cache capacity {self.capacity}")
        spans, past, slots, row = [], [], [], 0
        for slot, new in enumerate(num_new):
            if new:
                spans.append((row, row + new))
                past.append(self.lengths[slot])
                slots.append(slot)
                row += new
            self.lengths[slot] += new
        positions = _positions([b - a for a, b in spans], past, self.layers[0].device)
        return Context(positions, _segments(spans, past, slots), self, absorb)

    def write(self, layer: int, rows_TX: Tensor, segments: Sequence[Segment]) -> None:
        """Store the rows of every segment behind what its slot holds."""
        for s in segments:
            self.layers[layer][s.slot, s.past : s.past + s.num_new] = rows_TX[s.start : s.stop]

    def read(self, layer: int, segment: Segment) -> Tensor:
        """Everything that the segment may look at, its own rows included: a view [S, X]."""
        return self.layers[layer][segment.slot, : segment.past + segment.num_new]


def _segments(
    spans: Sequence[tuple[int, int]], past: Sequence[int] | None = None, slots: Sequence[int] | None = None
) -> tuple[Segment, ...]:
    past = past or [0] * len(spans)
    slots = slots or list(range(len(spans)))
    return tuple(Segment(a, b, p, i) for (a, b), p, i in zip(spans, past, slots, strict=True))


def _positions(lengths: Sequence[int], starts: Sequence[int], device: torch.device | str) -> Tensor:
    pieces = [torch.arange(s, s + n) for n, s in zip(lengths, starts, strict=True)]
    return torch.cat(pieces).to(device) if pieces else torch.empty(0, dtype=torch.int64, device=device)
