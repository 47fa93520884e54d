"""How the kernels of route cut their work: `chunk_of` by the bits it must not change, all else for speed alone."""

from __future__ import annotations

import math

from dsv2.kernels.route.reference import ROUTE_BLOCK

MULTIPROCESSORS = 132
"""Of an H100."""


def chunk_of(D: int) -> int:
    """Channels whose products add up from zero before the sum joins those of other chunks.

    It decides how logits round, so it depends on nothing but D. More channels are cut coarser: every part is written
    and read again.
    """
    return 256 if D <= 2048 else 512


def in_one_launch(T: int, D: int, E: int) -> bool:
    """Where the programs of one launch keep the GPU about as busy as parts would, which are written and read again."""
    most_in_parts = 1024 if E <= 64 else 2048
    return most_in_parts < T or chunk_of(D) >= D


def tiles(T: int, E: int, ieee: bool) -> dict[str, int]:
    """Of one launch. None of these changes a bit: a product adds up its terms in one order, 16 at a time, in any."""
    if ieee:
        return {"BK": 32 if E <= 128 else 16, "num_warps": 4 if E <= 128 else 8, "num_stages": 3}
    if E > 128:
        return {"BK": 64, "num_warps": 8, "num_stages": 6}
    if E > 64:
        return {"BK": 128, "num_warps": 4, "num_stages": 5}
    # Few programs have an SM each, and its memory for copies under way; of many, two share one.
    return {"BK": 128, "num_warps": 4, "num_stages": 8 if T <= 4096 else 5}


def part_tiles(T: int, D: int, E: int, ieee: bool) -> dict[str, int]:
    """Of the launch of parts: the smallest that all run at once, since those are done soonest.

    No more than two warps share 64 tokens: four would multiply them by another instruction, which may round otherwise.
    """
    chunk = chunk_of(D)
    programs = math.ceil(T / ROUTE_BLOCK) * math.ceil(D / chunk)
    fitting = [BE for BE in (16, 32, 64) if programs * math.ceil(E / BE) <= MULTIPROCESSORS or BE >= E]
    BT, BE, BK, num_warps = ROUTE_BLOCK, min(fitting, default=64), tiles(T, E, ieee)["BK"], 4
    if not fitting and not ieee:
        BT, BK, num_warps = 64, 64, 2
    # All of the chunk is under way at once, or six tiles of it.
    num_stages = 3 if ieee else min(chunk // BK + 1, 7)
    return {"BT": BT, "BE": BE, "BK": BK, "num_warps": num_warps, "num_stages": num_stages}


def tokens_a_program(T: int, E: int) -> int:
    """Of the launch that chooses, a warp each. Many experts of a whole block of tokens are too much for one program."""
    return ROUTE_BLOCK if T > 4 and E <= 64 else 4
