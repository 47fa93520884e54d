"""Sampling in Triton, two launches: segments of rows side by side, then one program a row. No sort, no cumulative sum.

The first launch perturbs every token and keeps the best of each segment. The best of the row is the draw, unless
min-p, top-k or top-p exclude it. What they keep is always those before some place in the order of tokens (larger
logit first, then lower index), so counting the tokens before the candidate, and their mass, decides; an excluded
candidate becomes the new bound, and the best before it the next candidate. Almost always the first is the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.backend import kernel_op, unit_stride

SEGMENT = 2048
"""Tokens of one program of the first launch."""

BLOCK = 16384
"""Tokens that the program of a row looks at together; a quarter of them where loads of 16 bytes are not possible."""

GROUP = tl.constexpr(32)
"""Tokens whose largest logit the search for the k-th starts from."""

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _number(x):
    """NaN counts as -inf, and +inf as the largest number."""
    x = x.to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), LARGEST)


@triton.jit
def _finite(x):
    """Something to subtract: differences to it are never NaN."""
    return tl.maximum(x, -LARGEST)


@triton.jit
def _weight(b_x, top, inverse_t):
    """Probability over that of the largest logit."""
    return tl.exp2(tl.minimum((b_x - top) * (inverse_t * LOG2E), 0.0))


@triton.jit
def _before(b_x, o_w, x, i_w):
    """Which tokens come strictly before the place (x, i_w)."""
    return (b_x > x) | ((b_x == x) & (o_w < i_w))


@triton.jit
def _best(b_x, o_w, W):
    """The largest of a block, and the lowest index that has it."""
    best = tl.max(b_x)
    return best, tl.min(tl.where(b_x == best, o_w, W))


@triton.jit
def _exponential(seed, step, o_n):
    """-log of uniform numbers for the four tokens of each Philox block. [R] -> [R, 4]"""
    c0 = o_n.to(tl.uint32)
    zero = c0 * 0
    r0, r1, r2, r3 = tl.philox(seed, c0, zero + step.to(tl.uint32), zero + (step >> 32).to(tl.uint32), zero)
    b_r = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [o_n.shape[0], 4])
    b_u = tl.minimum((b_r.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - u), by its series where 1 - u would round u away: the winner of a large vocabulary has a small one.
    b_series = b_u * (1.0 + b_u * (0.5 + b_u * (0.33333333 + b_u * 0.25)))
    return tl.where(b_u < 0.015625, b_series, -tl.log(1.0 - b_u))


@triton.jit
def _race(b_x, m_w, o_w, top, inverse_t, b_e, W):
    """Among the tokens that m_w admits, the winner, and its score: log probability (0 for `top`) + Gumbel noise.

    Scores are compared as exp(-score), exponential number over probability: one logarithm less a token. A token so far
    from `top` that its exponent must be cut has lost.
    """
    b_time = b_e * tl.exp2(tl.minimum((top - b_x) * (inverse_t * LOG2E), 120.0))
    b_time = tl.where(m_w & (b_x > float("-inf")), b_time, float("inf"))
    first = tl.min(b_time)
    return -tl.log(first), tl.min(tl.where(b_time == first, o_w, W))


@triton.jit
def _penalised(
    b_x, o_w, m_w, i_b, counts, prompt, presence, frequency, repetition, stride_counts, stride_prompt
):  # fmt: skip
    b_n = tl.zeros(b_x.shape, dtype=tl.int32)
    if counts is not None:
        b_n = tl.load(counts + i_b * stride_counts + o_w, mask=m_w, other=0)
    if repetition is not None:
        m_seen = b_n > 0
        if prompt is not None:
            m_seen |= tl.load(prompt + i_b * stride_prompt + o_w, mask=m_w, other=0) != 0
        r = tl.load(repetition + i_b)
        b_x = tl.where(m_seen, tl.where(b_x > 0, b_x / r, b_x * r), b_x)
    if frequency is not None:
        b_x -= tl.load(frequency + i_b) * b_n.to(tl.float32)
    if presence is not None:
        b_x -= tl.where(b_n > 0, tl.load(presence + i_b), 0.0)
    return _number(b_x)


@triton.jit
def _has_penalty(i_b, presence, frequency, repetition):
    found = False
    if presence is not None:
        found |= tl.load(presence + i_b) != 0.0
    if frequency is not None:
        found |= tl.load(frequency + i_b) != 0.0
    if repetition is not None:
        found |= tl.load(repetition + i_b) != 1.0
    return found


@triton.jit
def _limits(i_b, temperature, top_k, top_p, min_p, W):
    """1 / temperature (0: greedy), top_k, top_p, min_p, and whether top_k and top_p, and whether any, cut anything."""
    t = tl.load(temperature + i_b)
    k = tl.load(top_k + i_b)
    p = tl.load(top_p + i_b)
    m = tl.load(min_p + i_b)
    inverse_t = tl.where(t > 0, tl.minimum(1.0 / tl.where(t > 0, t, 1.0), 1e38), 0.0)
    has_k = (k > 0) & (k < W)
    has_p = p < 1.0
    return inverse_t, k, p, m, has_k, has_p, (inverse_t > 0) & (has_k | has_p | (m > 0))


@triton.jit
def _sample_segment_kernel(
    logits, scores, temperature, top_k, top_p, min_p, seed, step, counts, prompt, presence, frequency, repetition,
    parts, picks, groups, stride_logits, stride_counts, stride_prompt, W, S, R: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    # [R, 4]: the tokens of a Philox block belong to one thread.
    o_w = i_s * (R * 4) + tl.arange(0, R)[:, None] * 4 + tl.arange(0, 4)[None, :]
    m_w = o_w < W
    b_x = _number(tl.load(logits + i_b * stride_logits + o_w, mask=m_w, other=float("-inf")))
    raw_max = tl.max(b_x)
    raw_sum = tl.sum(tl.exp2((b_x - _finite(raw_max)) * LOG2E))
    inverse_t, _k, _p, _m, _has_k, _has_p, restricted = _limits(i_b, temperature, top_k, top_p, min_p, W)
    if scores is not None:
        if _has_penalty(i_b, presence, frequency, repetition):
            b_x = _penalised(
                b_x, o_w, m_w, i_b, counts, prompt, presence, frequency, repetition, stride_counts, stride_prompt
            )  # fmt: skip
        if restricted:
            tl.store(scores + i_b * W + o_w, b_x, mask=m_w)
    o_part = i_b * 5 * S + i_s
    top, i_top = _best(b_x, o_w, W)
    best, i_best = top, i_top
    if inverse_t > 0:
        b_e = _exponential(tl.load(seed + i_b), tl.load(step + i_b), i_s * R + tl.arange(0, R))
        best, i_best = _race(b_x, m_w, o_w, _finite(top), inverse_t, b_e, W)
    if restricted:
        NG: tl.constexpr = R * 4 // GROUP
        b_group = tl.max(tl.reshape(b_x, [NG, GROUP]), axis=1)
        tl.store(groups + (i_b * S + i_s) * NG + tl.arange(0, NG), b_group)
        tl.store(parts + o_part + 4 * S, tl.sum(_weight(b_x, _finite(top), inverse_t)))
    tl.store(parts + o_part, raw_max)
    tl.store(parts + o_part + S, raw_sum)
    tl.store(parts + o_part + 2 * S, top)
    tl.store(parts + o_part + 3 * S, best)
    tl.store(picks + i_b * 2 * S + i_s, i_top)
    tl.store(picks + i_b * 2 * S + S + i_s, i_best)


@triton.jit
def _mass_before(row, x, i_w, top, inverse_t, W, BR: tl.constexpr, BC: tl.constexpr):
    """How many tokens come before a place, and the sum of their weights. NaN comes before nothing."""
    o_w = tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
    # [BR], of BC tokens each that one thread adds up.
    b_n = tl.zeros([BR], dtype=tl.int32)
    b_mass = tl.zeros([BR], dtype=tl.float32)
    for start in range(0, W, BR * BC):
        b_x = tl.load(row + start + o_w, mask=start + o_w < W, other=float("-inf")).to(tl.float32)
        m_w = _before(b_x, start + o_w, x, i_w)
        b_n += tl.sum(m_w.to(tl.int32), axis=1)
        b_mass += tl.sum(tl.where(m_w, _weight(b_x, top, inverse_t), 0.0), axis=1)
    return tl.sum(b_n), tl.sum(b_mass)


@triton.jit
def _count_from(row, x, W, BR: tl.constexpr, BC: tl.constexpr):
    """How many tokens have logit x or more; the smallest of these logits, and the largest of the others."""
    o_w = tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
    # [BR], as above
    b_n = tl.zeros([BR], dtype=tl.int32)
    b_above = tl.full([BR], float("inf"), dtype=tl.float32)
    b_below = tl.full([BR], float("-inf"), dtype=tl.float32)
    for start in range(0, W, BR * BC):
        b_x = _number(tl.load(row + start + o_w, mask=start + o_w < W, other=float("-inf")))
        m_w = b_x >= x
        b_n += tl.sum(m_w.to(tl.int32), axis=1)
        b_above = tl.minimum(b_above, tl.min(tl.where(m_w, b_x, float("inf")), axis=1))
        b_below = tl.maximum(b_below, tl.max(tl.where(m_w, float("-inf"), b_x), axis=1))
    return tl.sum(b_n), tl.min(b_above), tl.max(b_below)


@triton.jit
def _to_key(x):
    """Integers in the order of floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kth_of_groups(groups, num_groups, k, BG: tl.constexpr):
    """The k-th largest of the groups' largest logits, which the k-th largest logit is not below; at least -LARGEST."""
    o_g = tl.arange(0, BG)
    b_key = _to_key(tl.load(groups + o_g, mask=o_g < num_groups, other=float("-inf")))
    key = tl.full([], -(2**31), tl.int64)
    for i in range(32):
        higher = key + (tl.full([], 1, tl.int64) << (31 - i))
        key = tl.where(tl.sum((b_key >= higher.to(tl.int32)).to(tl.int32)) >= k, higher, key)
    x = _from_key(key.to(tl.int32))
    # Without k groups the key is that of NaN.
    return tl.where(x > -LARGEST, x, -LARGEST)


@triton.jit
def _kth_largest(row, groups, num_groups, top, k, W, BG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The k-th largest logit; -inf where there are not k above it.

    Between two logits that enclose it the search tries, in turn, the next one up, where the counts would reach k if
    they were exponential (twice), and half-way in the integers that order floats: that bounds the number of passes
    whatever the logits are.
    """
    num_low, low, _below = _count_from(row, _kth_of_groups(groups, num_groups, k, BG), W, BR, BC)
    low = tl.where(num_low < k, float("-inf"), low)
    high, num_above = top, 0
    i = 0
    while (low < high) & (num_low > k):
        part = tl.log(num_low / (k - 0.5)) / tl.log(num_low / (num_above + 0.5))
        low_key = _to_key(low).to(tl.int64)
        key = tl.where(i % 4 == 0, low_key + 1, (low_key + _to_key(high).to(tl.int64) + 1) >> 1)
        x = tl.where(i % 2 == 1, low + part * (high - low), _from_key(key.to(tl.int32)))
        # Always progress, whatever rounding does to x.
        x = tl.where((x > low) & (x <= high), x, high)
        n, above, below = _count_from(row, x, W, BR, BC)
        low, num_low = tl.where(n >= k, above, low), tl.where(n >= k, n, num_low)
        high, num_above = tl.where(n >= k, high, below), tl.where(n >= k, num_above, n)
        i += 1
    return low


@triton.jit
def _search(
    row, groups, b_top, b_best, b_pick, top, mass, inverse_t, k, p, m, has_k, has_p, seed, step,
    W, S, R: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The best token that min-p, top-k and top-p keep; `mass` is the weight of all tokens."""
    o_s = tl.arange(0, BS)
    # The place before which a token must be; min-p admits p >= m * max(p), written in logits.
    x_end = top + tl.log(tl.where(m > 0, m, 1.0)) / inverse_t
    x_end = tl.where(m > 0, tl.where(x_end <= top, x_end, top), float("-inf"))
    i_end = W
    if has_p & (has_k | (m > 0)):
        by_k = False
        if has_k:
            x_k = _kth_largest(row, groups, S * (R * 4 // GROUP), top, k, W, BG, BR, BC)
            by_k = x_k >= x_end
            x_end = tl.maximum(x_k, x_end)
        # Of equals at the k-th place only the first belong to the mass.
        n, mass = _mass_before(row, x_end, tl.where(by_k, 0, W), top, inverse_t, W, BR, BC)
        mass += tl.where(by_k, (k - n) * _weight(x_end, top, inverse_t), 0.0)
    i_w = 0
    searching = True
    while searching:
        _score, i_s = _best(b_best, o_s, BS)
        i_w = tl.sum(tl.where(o_s == i_s, b_pick, 0))
        x = tl.load(row + i_w).to(tl.float32)
        if _before(x, i_w, x_end, i_end):
            kept = True
            if has_k | has_p:
                n, mass_before = _mass_before(row, x, i_w, top, inverse_t, W, BR, BC)
                kept = ((n < k) | (not has_k)) & ((mass_before < p * mass) | (n == 0) | (not has_p))
            searching = not kept
            x_end = tl.where(kept, x_end, x)
            i_end = tl.where(kept, i_end, i_w)
        else:
            # The best of this segment is out; look for its best before the bound.
            o_w = i_s * (R * 4) + tl.arange(0, R)[:, None] * 4 + tl.arange(0, 4)[None, :]
            b_x = tl.load(row + o_w, mask=o_w < W, other=float("-inf")).to(tl.float32)
            base = tl.max(tl.where(o_s == i_s, b_top, float("-inf")))
            b_e = _exponential(seed, step, i_s * R + tl.arange(0, R))
            best, pick = _race(b_x, _before(b_x, o_w, x_end, i_end), o_w, base, inverse_t, b_e, W)
            b_best = tl.where(o_s == i_s, best + (base - top) * inverse_t, b_best)
            b_pick = tl.where(o_s == i_s, pick, b_pick)
    return i_w


@triton.jit
def _sample_row_kernel(
    logits, scores, temperature, top_k, top_p, min_p, seed, step, parts, picks, groups, ids, log_probs,
    stride_logits, stride_scores, W, S,
    R: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    b_part = parts + i_b * 5 * S + o_s
    b_raw_max = tl.load(b_part, mask=m_s, other=float("-inf"))
    b_raw_sum = tl.load(b_part + S, mask=m_s, other=0.0)
    b_top = tl.load(b_part + 2 * S, mask=m_s, other=float("-inf"))
    b_best = tl.load(b_part + 3 * S, mask=m_s, other=float("-inf"))
    raw_max = _finite(tl.max(b_raw_max))
    # The largest alone adds 1, where there is one.
    raw_sum = tl.maximum(tl.sum(b_raw_sum * tl.exp(_finite(b_raw_max) - raw_max)), 1.0)
    inverse_t, k, p, m, has_k, has_p, restricted = _limits(i_b, temperature, top_k, top_p, min_p, W)
    top, i_s = _best(b_top, o_s, BS)
    i_w = tl.load(picks + i_b * 2 * S + i_s)
    if inverse_t > 0:
        # From segments' own scales to the row's.
        b_best = tl.where(b_top > float("-inf"), b_best + (b_top - _finite(top)) * inverse_t, float("-inf"))
        _score, i_s = _best(b_best, o_s, BS)
        i_w = tl.load(picks + i_b * 2 * S + S + i_s)
        if restricted & (top > float("-inf")):
            b_pick = tl.load(picks + i_b * 2 * S + S + o_s, mask=m_s, other=0)
            b_mass = tl.load(b_part + 4 * S, mask=m_s, other=0.0)
            i_w = _search(
                scores + i_b * stride_scores, groups + i_b * S * (R * 4 // GROUP), b_top, b_best, b_pick, top,
                tl.sum(b_mass * _weight(b_top, top, inverse_t)), inverse_t, k, p, m, has_k, has_p,
                tl.load(seed + i_b), tl.load(step + i_b), W, S, R, BS, BG, BR, BC,
            )  # fmt: skip
    chosen = _number(tl.load(logits + i_b * stride_logits + i_w))
    tl.store(ids + i_b, i_w.to(tl.int64))
    tl.store(log_probs + i_b, tl.where(chosen > float("-inf"), chosen - raw_max - tl.log(raw_sum), chosen))


@kernel_op("dsv2::sample")
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logits = unit_stride(logits)
    B, W = logits.shape
    S = triton.cdiv(W, SEGMENT)
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(B, dtype=torch.float32, device=logits.device)
    if not B:
        return ids, log_probs
    num_groups = S * SEGMENT // GROUP.value
    groups = torch.empty(B, num_groups, dtype=torch.float32, device=logits.device)
    parts = torch.empty(B, 5, S, dtype=torch.float32, device=logits.device)
    picks = torch.empty(B, 2, S, dtype=torch.int32, device=logits.device)
    limits = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seed, step)]
    counts, prompt = (None if x is None else unit_stride(x) for x in (output_counts, prompt_mask))
    penalties = [
        None if x is None else x.contiguous() for x in (presence_penalty, frequency_penalty, repetition_penalty)
    ]
    # Where penalties change logits, the second launch reads what the first made of them.
    changed = any(x is not None for x in penalties)
    scores = torch.empty(B, W, dtype=torch.float32, device=logits.device) if changed else None
    _sample_segment_kernel[(B, S)](
        logits, scores, *limits, counts, prompt, *penalties, parts, picks, groups, logits.stride(0),
        0 if counts is None else counts.stride(0), 0 if prompt is None else prompt.stride(0), W, S, R=SEGMENT // 4,
        num_warps=4,
    )  # fmt: skip
    read = logits if scores is None else scores
    # What a thread loads at once: 16 bytes where rows begin and end at such borders, and less together elsewhere.
    aligned = not (W % 16 or read.stride(0) % 16 or read.data_ptr() % 16)
    BC = 16 // read.element_size() if aligned else 1
    BR = (BLOCK if aligned else BLOCK // 4) // BC
    _sample_row_kernel[(B,)](
        logits, read, *limits, parts, picks, groups, ids, log_probs, logits.stride(0), read.stride(0), W, S,
        R=SEGMENT // 4, BS=max(triton.next_power_of_2(S), 16), BG=triton.next_power_of_2(num_groups), BR=BR, BC=BC,
        num_warps=32,
    )  # fmt: skip
    return ids, log_probs


@sample.register_fake
def _(logits, *_, **__):
    return logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits), dtype=torch.float32)
