"""`EngineConfig`: how much an engine takes on at once. Standard library only.

These are limits: they may refuse, delay or end a request, but change no number that the model computes. What one
request asks for is in `dsv2.engine.sampling`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv2.config.schema import require

PAGE_SIZE = 64
"""Tokens a page of the cache; the attention kernels know no other."""

MAX_DRAFT_TOKENS = 7
"""With the token before them as many as the attention kernels take of a sequence at once."""

_SMALL_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine, under vLLM's names where it has them. Raises ValueError outside the ranges."""

    max_model_len: int
    """Tokens a sequence may have, prompt and output together."""
    max_num_seqs: int = 256
    """Sequences that hold pages at once."""
    max_num_batched_tokens: int = 8192
    """Tokens a step computes at most; longer prompts are computed in chunks."""
    num_pages: int | None = None
    """Pages of the cache; None: as many as `gpu_memory_utilization` leaves room for."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, cache and workspace may take together."""
    enable_prefix_caching: bool = True
    """Whether sequences share the full pages of equal beginnings, also those of finished ones."""
    num_draft_tokens: int = 0
    """Tokens guessed ahead of a sequence and verified together, at most 7; 0 turns speculation off."""
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    """Numbers of rows for which decode steps are captured when first needed; a step takes the next larger size. None: a
    list up to `max_num_seqs` on a GPU, none on a CPU, where such steps are padded only."""

    def __post_init__(self) -> None:
        require(
            0 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS,
            f"engine.num_draft_tokens={self.num_draft_tokens} must be in 0..{MAX_DRAFT_TOKENS}",
        )
        require(
            all(size > 0 for size in self.cudagraph_capture_sizes or ()),
            f"engine.cudagraph_capture_sizes={self.cudagraph_capture_sizes} must be positive",
        )
        for name in ("max_num_seqs", "max_num_batched_tokens", "num_pages"):
            value = getattr(self, name)
            require(value is None or value > 0, f"engine.{name}={value} must be positive")
        # A prompt of one token and the token that follows it.
        require(self.max_model_len >= 2, f"engine.max_model_len={self.max_model_len} must be at least 2")
        fraction = self.gpu_memory_utilization
        require(0 < fraction <= 1, f"engine.gpu_memory_utilization={fraction} must be in (0, 1]")
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"engine.max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
            f"max_num_seqs={self.max_num_seqs}, so that a step has a token for every sequence",
        )

    def graph_sizes(self, device_type: str) -> tuple[int, ...]:
        """Sizes of decode steps on such a device, ascending; none where each has the size of its rows."""
        if self.cudagraph_capture_sizes is not None:
            return tuple(sorted(set(self.cudagraph_capture_sizes)))
        if device_type != "cuda":
            return ()
        most = self.max_num_seqs * (1 + self.num_draft_tokens)
        sizes = [*_SMALL_SIZES, *range(80, 257, 16), *range(288, 513, 32), *range(576, 4097, 64)]
        return (*(size for size in sizes if size < most), most)
