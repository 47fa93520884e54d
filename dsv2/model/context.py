"""What a forward step is told besides the weights: which rows belong to which sequence, and what is cached.

Tokens are packed `[T, ...]` everywhere. A training step, a prefill and a decode step differ in their `Context` only.
This room does not allocate pages or schedule requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dsv2.config import ModelConfig
from dsv2.config.counts import kv_elements_per_token
from dsv2.device import to_device
from dsv2.kernels.latent_cache import PAGE_SIZE
from dsv2.kernels.mla_decode import MAX_QUERY_TOKENS, DecodePlan, num_parts, plan_decode


@dataclass(frozen=True, slots=True)
class Routing:
    """What one MoE layer decided: softmax over all experts [T, E] fp32, chosen experts [T, A], gates [T, A] fp32.

    `block_counts` [blocks, E] int32: how often the tokens of each block chose each expert, see `kernels.route`.
    `kept_TA` bool is False where a row was dropped, whose gate is then 0; None: no row could be.
    """

    scores_TE: Tensor
    experts_TA: Tensor
    gates_TA: Tensor
    block_counts: Tensor
    kept_TA: Tensor | None = None

    def groups_TA(self, num_groups: int) -> Tensor:
        """Of each chosen expert, the group that it is in: groups are experts side by side, as many each, [T, A]."""
        return self.experts_TA // (self.scores_TE.shape[1] // num_groups)


@dataclass(frozen=True, slots=True)
class Dropping:
    """How much a device takes, in mean loads, and the tokens that are never dropped, [T] bool: see `dropping`."""

    capacity_factor: float
    exempt_T: Tensor


@dataclass(frozen=True, slots=True)
class Paged:
    """Where a step lies in a paged cache; slots are page * 64 + offset.

    `layers` hold pages [num_pages, 64, X]. Row t is written to `slots_T`[t] int64, unless that is negative. The first
    `num_absorbed` rows attend in the absorbed form, through `page_table` [B, max_pages] int32 up to `lengths` [B]
    int32, which have an entry for every sequence, or for every row where sequences have different numbers of rows or
    too many for the kernel; `plan` deals that work to a GPU, for all layers at once. The rows after them attend in the
    expanded form, to the slots `visible_S`: the tokens that were cached before the step, `cu_past` [B' + 1] int32 of
    them by sequence, then those rows' own.
    """

    layers: Sequence[Tensor]
    slots_T: Tensor
    num_absorbed: int
    page_table: Tensor
    lengths: Tensor
    plan: DecodePlan | None
    visible_S: Tensor
    cu_past: Tensor

    def write(self, layer: int, rows_TX: Tensor) -> None:
        self.layers[layer].flatten(0, 1).index_copy_(0, self.slots_T, rows_TX.detach())

    def read(self, layer: int) -> Tensor:
        """Rows [S, X] of `visible_S`."""
        return self.layers[layer].flatten(0, 1).index_select(0, self.visible_S)


@dataclass(slots=True)
class Context:
    """Rows bounds[i]:bounds[i + 1] are consecutive tokens of one sequence; `cu_seqlens` int32 has bounds on the device.

    Over a cache they count the rows after `paged.num_absorbed`; without one, `absorb` selects MLA's absorbed form
    (section 2.1.2). `positions_T` int64. Every MoE layer appends to `routings` where a list is given; balance losses
    and load statistics read it. With `dropping`, which belongs to training, devices take a limited number of rows.
    `side_stream` is where shared experts run beside the router and the routed experts: for steps inside a CUDA graph,
    whose memory nothing else takes.
    """

    positions_T: Tensor
    bounds: tuple[int, ...]
    cu_seqlens: Tensor
    absorb: bool = False
    paged: Paged | None = None
    routings: list[Routing] | None = field(default=None, repr=False)
    dropping: Dropping | None = None
    side_stream: torch.cuda.Stream | None = None

    @staticmethod
    def packed(cu_seqlens: Sequence[int], device: torch.device | str = "cpu", absorb: bool = False) -> Context:
        """Whole documents side by side: document i is rows cu_seqlens[i]:cu_seqlens[i+1]; none sees another."""
        bounds = [int(b) for b in cu_seqlens]
        if bounds[:1] != [0] or any(b < a for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds[:8]}")
        counts = [b - a for a, b in pairwise(bounds) if b > a]
        return _context(counts, _rows(counts, [0] * len(counts))[1], device, absorb)

    @staticmethod
    def cached(
        layers: Sequence[Tensor],
        table_BP: Tensor,
        past: Sequence[int],
        counts: Sequence[int],
        num_heads: int,
        num_absorbed: int = 0,
    ) -> Context:
        """A step of counts[i] > 0 new tokens of sequences that have past[i] tokens in the pages `table_BP`[i].

        Args:
            layers: pages [num_pages, 64, X] of every layer.
            table_BP: [B, max_pages] int32 on the CPU; entries past a sequence's last token are not looked at.
            num_heads: of the model, by which a GPU's share of absorbed attention is measured.
            num_absorbed: how many sequences, from the first on, attend in the absorbed form.

        The host computes, the device gets the results.
        """
        device, n = layers[0].device, num_absorbed
        sequence_T, positions_T = _rows(counts, past)
        slots_T = _slots(table_BP, sequence_T, positions_T)
        num_rows = sum(counts[:n])
        visible_S = torch.cat((_slots(table_BP[n:], *_rows(past[n:], [0] * len(past[n:]))), slots_T[num_rows:]))
        lengths_B, page_table = torch.tensor(past[:n]) + torch.tensor(counts[:n]), table_BP[:n]
        if len(set(counts[:n])) > 1 or max(counts[:n], default=0) > MAX_QUERY_TOKENS:
            # A sequence of its own for every row, whose history ends with the row.
            page_table, lengths_B = table_BP[sequence_T[:num_rows]], positions_T[:num_rows] + 1
        lengths_B = to_device(lengths_B.to(torch.int32), device)
        context = _context(counts[n:], positions_T, device)
        context.paged = Paged(
            layers=layers,
            slots_T=to_device(slots_T, device),
            num_absorbed=num_rows,
            page_table=to_device(page_table, device),
            lengths=lengths_B,
            plan=_plan(lengths_B, num_rows * num_heads),
            visible_S=to_device(visible_S, device),
            cu_past=to_device(torch.tensor([0, *accumulate(past[n:])], dtype=torch.int32), device),
        )
        return context

    @staticmethod
    def decode(
        layers: Sequence[Tensor],
        slots_B: Tensor,
        page_table: Tensor,
        positions_B: Tensor,
        lengths: Tensor,
        num_heads: int,
    ) -> Context:
        """A step of one row each of B histories, in the absorbed form, from what is on the device already.

        Row b is at positions_B[b] int64 and is written to slots_B[b] int64; it sees lengths[b] int32 tokens, its own
        included, through page_table[b]. A row of padding has slot -1 and length 0. Shapes decide everything that is
        launched, so a CUDA graph can hold the step.
        """
        cu_seqlens = torch.zeros(1, dtype=torch.int32, device=positions_B.device)
        context = Context(positions_B, (0,), cu_seqlens)
        context.paged = Paged(
            layers=layers,
            slots_T=slots_B,
            num_absorbed=len(slots_B),
            page_table=page_table,
            lengths=lengths,
            plan=_plan(lengths, len(slots_B) * num_heads),
            visible_S=slots_B[:0],
            cu_past=cu_seqlens,
        )
        return context


class Cache:
    """Keys and values of sequences in pages of 64 tokens: one tensor [num_pages, 64, X] a layer.

    With MLA a token's X elements are the normalised latent (C) and the rotated shared key (R); otherwise its keys
    and values. `lengths[i]` counts the tokens of slot i, which lie in the pages `page_table[i]` (on the CPU).
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
        num_pages = num_slots * -(-capacity // PAGE_SIZE)
        shape = (num_pages, PAGE_SIZE, kv_elements_per_token(cfg) // cfg.num_layers)
        self.layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(cfg.num_layers)]
        self.page_table = torch.arange(num_pages, dtype=torch.int32).view(num_slots, -1)
        self.num_heads, self.capacity = cfg.num_heads, capacity
        self._has_absorbed_form = cfg.attention.kind == "mla"
        self.lengths = [0] * num_slots

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.layers)

    def extend(self, num_new: Sequence[int], absorb: bool = False) -> Context:
        """Reserve `num_new[i]` tokens in slot i and return the context of the step that fills them.

        `absorb` selects MLA's absorbed form, which GQA does not have.

        Raises ValueError, with nothing reserved, unless there is one count a slot and each fits.
        """
        if len(num_new) != len(self.lengths):
            raise ValueError(f"{len(num_new)} counts for {len(self.lengths)} slots")
        for slot, (length, new) in enumerate(zip(self.lengths, num_new, strict=True)):
            if new < 0:
                raise ValueError(f"slot {slot}: num_new={new} must not be negative")
            if length + new > self.capacity:
                raise ValueError(f"slot {slot}: {length} + {new} tokens exceed the cache capacity {self.capacity}")
        slots = [slot for slot, new in enumerate(num_new) if new]
        past, counts = [self.lengths[slot] for slot in slots], [num_new[slot] for slot in slots]
        self.lengths = [length + new for length, new in zip(self.lengths, num_new, strict=True)]
        num_absorbed = len(slots) if absorb and self._has_absorbed_form else 0
        return Context.cached(self.layers, self.page_table[slots], past, counts, self.num_heads, num_absorbed)


def _context(counts: Sequence[int], positions_T: Tensor, device: torch.device | str, absorb: bool = False) -> Context:
    bounds = (0, *accumulate(counts))
    cu_seqlens = to_device(torch.tensor(bounds, dtype=torch.int32), device)
    return Context(to_device(positions_T, device), bounds, cu_seqlens, absorb)


def _plan(lengths: Tensor, num_rows: int) -> DecodePlan | None:
    """`num_rows`: query tokens times heads, of all sequences."""
    if lengths.device.type != "cuda" or not len(lengths):
        return None
    return plan_decode(lengths, num_parts(num_rows // len(lengths), lengths.device))


def _rows(counts: Sequence[int], first: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sequence and position of every row of counts[i] consecutive tokens of sequence i from first[i] on, int64."""
    counts_B, first_B = (torch.tensor(x, dtype=torch.int64) for x in (counts, first))
    sequence_T = torch.arange(len(counts_B)).repeat_interleave(counts_B)
    shift_B = first_B - (counts_B.cumsum(0) - counts_B)
    return sequence_T, torch.arange(len(sequence_T)) + shift_B[sequence_T]


def _slots(table_BP: Tensor, sequence_T: Tensor, positions_T: Tensor) -> Tensor:
    return table_BP[sequence_T, positions_T // PAGE_SIZE].long() * PAGE_SIZE + positions_T % PAGE_SIZE
