"""mla_decode beyond parity: the deal of pages, what is never read, refusals, and that the Hopper kernels compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.kernels.case import Maker
from dsv2.kernels.mla_decode import OVERHEAD_PAGES, PAGE, kernel, mla_decode, plan_decode, reference
from dsv2.kernels.mla_decode.cases import CASES
from tests.numerics import assert_close

ROOT = Path(__file__).parents[2]
SMALL = next(case for case in CASES if case.name.startswith("ragged-H16-n3"))


def inputs(**changes: Any) -> dict[str, Any]:
    return SMALL.inputs(Maker.seeded(0)) | changes


# The deal of pages ------------------------------------------------------------------------------------------------


def pieces(lengths: list[int], num_parts: int) -> list[tuple[int, int, int, int]]:
    """(sequence, first page, end page, slot) of every piece of work in the plan; slot -1 where nothing is cut."""
    plan = plan_decode(torch.tensor(lengths, dtype=torch.int32), num_parts)
    splits, found = plan.splits.tolist(), []
    for begin, begin_page, end, end_page, slot, *_ in plan.parts.tolist():
        for b in range(begin, end + 1):
            first = begin_page if b == begin else 0
            last = end_page if b == end else -(-lengths[b] // PAGE)
            is_cut = splits[b + 1] > splits[b]
            found.append((b, first, last, (slot if b == begin else splits[b]) if is_cut else -1))
    return found


LENGTHS = st.lists(st.integers(0, 3000), max_size=12)


@given(LENGTHS, st.integers(1, 40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_page_of_every_sequence_is_dealt_once(lengths, num_parts) -> None:
    dealt: dict[int, list[tuple[int, int]]] = {b: [] for b in range(len(lengths))}
    for b, first, last, _ in pieces(lengths, num_parts):
        dealt[b].append((first, last))
    for b, spans in dealt.items():
        assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
        assert spans[-1][1] == -(-lengths[b] // PAGE)


@given(LENGTHS, st.integers(1, 40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_pieces_of_cut_sequences_have_slots_of_their_own_within_the_buffer(lengths, num_parts) -> None:
    slots = [slot for *_, slot in pieces(lengths, num_parts) if slot >= 0]
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= 2 * num_parts


@given(LENGTHS, st.integers(1, 40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_cut_sequences_are_listed_and_no_others(lengths, num_parts) -> None:
    plan = plan_decode(torch.tensor(lengths, dtype=torch.int32), num_parts)
    cut = [b for b in range(len(lengths)) if plan.splits[b + 1] > plan.splits[b]]
    assert plan.cut.tolist() == cut + [-1] * (num_parts - len(cut))


@given(LENGTHS, st.integers(1, 40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_part_does_much_more_than_its_share(lengths, num_parts) -> None:
    pages = [-(-n // PAGE) for n in lengths]
    share = sum(p + OVERHEAD_PAGES for p in pages) / num_parts + OVERHEAD_PAGES + 1
    plan = plan_decode(torch.tensor(lengths, dtype=torch.int32), num_parts)
    for begin, begin_page, end, end_page, *_ in plan.parts.tolist():
        work = sum(pages[b] + OVERHEAD_PAGES for b in range(begin, end)) - begin_page + end_page + OVERHEAD_PAGES
        assert end < begin or work <= 1.05 * share


@pytest.mark.parametrize(("batch", "length"), [(128, 4096), (128, 8192), (256, 4096), (256, 1100), (512, 576)])
def test_equal_sequences_that_nearly_fill_the_parts_are_not_cut(batch, length) -> None:
    assert not plan_decode(torch.full((batch,), length, dtype=torch.int32), 132).splits.any()


def test_sequences_of_similar_lengths_are_not_cut() -> None:
    lengths = torch.randint(513, 641, (512,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert not plan_decode(lengths, 132).splits.any()


# What is computed -------------------------------------------------------------------------------------------------


def test_all_heads_and_tokens_equal_plain_softmax_attention() -> None:
    args = inputs()
    y, lse = mla_decode(**args)
    T, _, C = args["q_latent"].shape
    n = T // len(args["lengths"])
    for b, length in enumerate(args["lengths"].tolist()):
        rows = args["cache"][args["page_table"][b, : -(-length // PAGE)].long()].flatten(0, 1)[:length]
        for i in range(n):
            seen = rows[: max(length - n + i + 1, 0)]
            if not len(seen):
                assert not y[b * n + i].any()
                assert (lse[b * n + i] == float("-inf")).all()
                continue
            q = torch.cat((args["q_latent"][b * n + i], args["q_rope"][b * n + i]), -1)
            logits = args["scale"] * q @ seen.T
            assert_close(lse[b * n + i], logits.logsumexp(-1), what="log-sum-exp")
            assert_close(y[b * n + i], logits.softmax(-1) @ seen[:, :C])


def test_the_result_does_not_depend_on_where_pages_lie() -> None:
    args = inputs()
    order = torch.randperm(len(args["cache"]), generator=torch.Generator().manual_seed(1))
    table = args["page_table"].clone()
    used = table < len(order)
    table[used] = order.argsort()[table[used].long()].int()
    moved = reference.mla_decode(**args | {"cache": args["cache"][order], "page_table": table})
    for a, b in zip(moved, reference.mla_decode(**args), strict=True):
        assert torch.equal(a, b)


def test_lengths_may_be_strided() -> None:
    args = inputs()
    strided = torch.stack((args["lengths"], args["lengths"] + 7), 1)[:, 0]
    viewed: dict[str, Any] = args | {"lengths": strided}
    for a, b in zip(kernel.mla_decode(**viewed), kernel.mla_decode(**args), strict=True):
        assert torch.equal(a, b)


# Refusals ---------------------------------------------------------------------------------------------------------


BAD = {
    "cache has shape .*, expected .any, 64, 56.": {"cache": torch.zeros(3, 32, 56)},
    "cache is float16, expected float32": {"cache": torch.zeros(24, 64, 56).half()},
    "cache has strides .*, expected contiguous pages": {"cache": torch.zeros(64, 24, 56).transpose(0, 1)},
    "q_rope has shape": {"q_rope": torch.zeros(21, 5, 8)},
    "q_rope is float64, expected float32": {"q_rope": torch.zeros(21, 16, 8).double()},
    "page_table has shape .*, expected .7, any.": {"page_table": torch.zeros(2, 9, dtype=torch.int32)},
    "page_table is int64, expected int32": {"page_table": torch.zeros(7, 9, dtype=torch.int64)},
    "lengths is int64, expected int32": {"lengths": torch.zeros(7, dtype=torch.int64)},
    "q_latent has 21 tokens for 2 sequences, expected 1 to 8": {
        "lengths": torch.zeros(2, dtype=torch.int32),
        "page_table": torch.zeros(2, 9, dtype=torch.int32),
    },
    "lengths is on meta, q_latent on cpu": {"lengths": torch.zeros(7, dtype=torch.int32, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_match_is_named_with_both_values(message) -> None:
    with pytest.raises(ValueError, match=message):
        mla_decode(**inputs(**BAD[message]))


@pytest.mark.parametrize("num_sequences", [6, 8])
def test_a_plan_of_another_step_is_refused(num_sequences: int) -> None:
    stale = plan_decode(torch.ones(num_sequences, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=f"plan is of {num_sequences} sequences, expected one of the 7 of lengths"):
        mla_decode(**inputs(plan=stale))


def test_a_cache_that_the_copy_engine_cannot_read_is_refused() -> None:
    cache = inputs()["cache"]
    moved = torch.cat((cache.new_zeros(1), cache.flatten()))[1:].view(cache.shape)
    with pytest.raises(ValueError, match="cache begins 4 bytes past a multiple of 16, expected at one"):
        kernel.mla_decode(**inputs(cache=moved))


def test_a_plan_needs_a_part() -> None:
    with pytest.raises(ValueError, match="num_parts is 0, expected at least 1"):
        plan_decode(torch.zeros(1, dtype=torch.int32), 0)


# Hopper -----------------------------------------------------------------------------------------------------------


def test_the_hopper_kernels_compile_into_matrix_instructions_that_overlap() -> None:
    """Gluon is not interpreted, but needs no GPU to compile; ptxas tells where it had to serialise wgmma."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_hopper", "mla_decode"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["rows"] for k in kernels] == [16, 32, 64]
    for k in kernels:
        assert k["shared_bytes"] <= 232_448
        assert k["matrix_instructions"] >= 36  # 576 channels, 16 at a time
        assert not k["serialised"]
