"""The oracle of the model's tests: DeepSeek-V2's equations in numpy float64 and plain loops.

Paper: sections 2.1 (MLA), 2.2 (DeepSeekMoE), 3.1.4 (YaRN); names and row orders of the official checkpoint.
It imports nothing of dsv2; no batch, no incremental decoding, no gradient, no token dropping, no speed.

Letters: T tokens, D hidden, H heads, N nope width, R rope width, V value width, Q query latent, C KV latent,
E routed experts, G groups, K KV heads of GQA; `q_THN` is [T, H, N]. One document, positions 0..T-1, causal.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tests.paper.layout import Array, Config, Tensors, is_moe, mixtral_config, mixtral_tensors
from tests.paper.layout import random_tensors as random_tensors

Attention = Callable[[Config, Tensors, Array], tuple[Array, tuple[Array, Array]]]

# NOTE: the official code leaves the two latent norms at the default eps; rms_norm_eps is for the others.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Routing:
    """One layer: scores s [T, E], softmax over all experts; the chosen experts of each token; gates g [T, E].

    A gate is 0 where not chosen, and it is the one before routed_scaling_factor.
    """

    scores: Array
    chosen: list[set[int]]
    gates: Array


@dataclass(frozen=True)
class Result:
    """logits [T, vocab]; routing by layer index, MoE layers only; the cache entries of each layer.

    MLA caches (c_kv [T, C] after its norm, k_rope [T, R] after rotation, pairs in place); GQA caches
    (keys [T, K, width] after rotation, values [T, K, width]).
    """

    logits: Array
    routing: dict[int, Routing]
    cache: list[tuple[Array, Array]]


def forward(config: Config, tensors: Tensors, tokens: Sequence[int], absorbed: bool = False) -> Result:
    """DeepSeek-V2 on one document; `absorbed` picks the form of attention. ValueError for what is not V2."""
    _require(config, hidden_act="silu", scoring_func="softmax", attention_bias=False)
    form = attention_absorbed if absorbed else attention_expanded
    return _decoder(config, tensors, tokens, partial(mla_attention, form))


def gqa_forward(config: Config, tensors: Tensors, tokens: Sequence[int]) -> Result:
    """The comparison models, by model_type: llama, qwen2 (QKV bias), mixtral, deepseek (DeepSeekMoE 16B)."""
    if config["model_type"] not in ("llama", "qwen2", "mixtral", "deepseek"):
        raise ValueError(f"model_type={config['model_type']!r}: expected llama, qwen2, mixtral or deepseek")
    _require(config, hidden_act="silu", rope_scaling=None, attention_bias=False, use_sliding_window=False)
    if config["model_type"] == "mixtral":
        config, tensors = mixtral_config(config), mixtral_tensors(tensors)
    return _decoder(config, tensors, tokens, gqa_attention)


def _decoder(config: Config, tensors: Tensors, tokens: Sequence[int], attention: Attention) -> Result:
    """Pre-norm residual blocks, a final norm, and the head."""
    for name, tensor in tensors.items():
        if tensor.dtype != np.float64:
            raise ValueError(f"{name} is {tensor.dtype}: expected float64")
    eps = config["rms_norm_eps"]
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding if config.get("tie_word_embeddings") else tensors["lm_head.weight"]
    x_TD = np.array([embedding[token] for token in tokens])
    result = Result(np.zeros((len(tokens), len(head))), {}, [])
    for layer in range(config["num_hidden_layers"]):
        block = _under(tensors, f"model.layers.{layer}.")
        h_TD = np.array([rms_norm(x, block["input_layernorm.weight"], eps) for x in x_TD])
        out_TD, entry = attention(config, _under(block, "self_attn."), h_TD)
        result.cache.append(entry)
        x_TD = x_TD + out_TD
        u_TD = np.array([rms_norm(x, block["post_attention_layernorm.weight"], eps) for x in x_TD])
        if is_moe(config, layer):
            out_TD, result.routing[layer] = moe(config, _under(block, "mlp."), u_TD)
        else:
            out_TD = np.array([swiglu(_under(block, "mlp."), "", u) for u in u_TD])
        x_TD = x_TD + out_TD
    for t, x in enumerate(x_TD):
        result.logits[t] = head @ rms_norm(x, tensors["model.norm.weight"], eps)
    return result


def _require(config: Config, **expected: Any) -> None:
    """Refuse what these equations do not cover; an absent key counts as the expected value."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r}: expected {value!r}")


def _under(tensors: Tensors, prefix: str) -> dict[str, Array]:
    """The tensors whose names start with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * gain, of one vector."""
    return x / math.sqrt(np.mean(x**2) + eps) * gain


def softmax(x: Array) -> Array:
    """exp(x_i) / sum_j exp(x_j), of one vector."""
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def swiglu(tensors: Tensors, prefix: str, x: Array) -> Array:
    """W_down (SiLU(W_gate x) * W_up x), of one vector."""
    gate, up, down = (tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    a = gate @ x
    return down @ (a / (1.0 + np.exp(-a)) * (up @ x))


def cross_entropy(logits: Array, targets: Sequence[int]) -> float:
    """Mean of -ln p(target), nats. logits [T, vocab]; targets[t] is the token that follows token t."""
    total = 0.0
    for row, target in zip(logits - np.max(logits, axis=1, keepdims=True), targets, strict=True):
        total += math.log(np.sum(np.exp(row))) - row[target]
    return float(total / len(targets))


def rotate_interleaved(x: Array, position: int, frequencies: Array) -> Array:
    """DeepSeek-V2: pair i is (x[2i], x[2i+1]); it turns by position * frequencies[i] and stays in place."""
    return _rotate(x, position * frequencies, [(2 * i, 2 * i + 1) for i in range(len(x) // 2)])


def rotate_half_split(x: Array, position: int, frequencies: Array) -> Array:
    """Llama, Qwen2, Mixtral: pair i is (x[i], x[i + n/2])."""
    return _rotate(x, position * frequencies, [(i, i + len(x) // 2) for i in range(len(x) // 2)])


def _rotate(x: Array, angles: Array, pairs: list[tuple[int, int]]) -> Array:
    out = np.empty_like(x)
    for angle, (a, b) in zip(angles, pairs, strict=True):
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def yarn_range(dim: int, theta: float, rope_scaling: Config) -> tuple[int, int]:
    """The pairs (low, high) between which YaRN's ramp goes from 0 to 1."""

    def correction(rotations: float) -> float:
        original = rope_scaling["original_max_position_embeddings"]
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = math.floor(correction(rope_scaling["beta_fast"]))
    high = math.ceil(correction(rope_scaling["beta_slow"]))
    return max(low, 0), min(high, dim - 1)


def yarn_frequencies(dim: int, theta: float, rope_scaling: Config | None) -> Array:
    """Radians per position of the dim/2 pairs; rope_scaling None is plain RoPE."""
    frequencies = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if rope_scaling is None:
        return frequencies
    kind = rope_scaling.get("type", rope_scaling.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling type={kind!r}: expected 'yarn'")
    low, high = yarn_range(dim, theta, rope_scaling)
    width = high - low if high != low else 0.001  # an empty range is a step, as in the official code
    for i in range(dim // 2):
        ramp = min(max((i - low) / width, 0.0), 1.0)
        frequencies[i] = frequencies[i] * (1 - ramp) + frequencies[i] / rope_scaling["factor"] * ramp
    return frequencies


def length_factor(factor: float, coefficient: float) -> float:
    """m = 0.1 * coefficient * ln(factor) + 1: with 0.707 the paper's sqrt(t) = 0.0707 ln s + 1."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def rotary_ratio(rope_scaling: Config | None) -> float:
    """What YaRN multiplies cos and sin by: 1 when mscale = mscale_all_dim, as in every official config."""
    if rope_scaling is None:
        return 1.0
    m, m_all = rope_scaling.get("mscale", 1.0), rope_scaling.get("mscale_all_dim", 0.0)
    return length_factor(rope_scaling["factor"], m) / length_factor(rope_scaling["factor"], m_all)


def softmax_scale(qk_dim: int, rope_scaling: Config | None) -> float:
    """1/sqrt(qk_dim), times m(mscale_all_dim)^2 under YaRN; qk_dim = N + R in the absorbed form too."""
    m = 1.0
    if rope_scaling is not None:
        m = length_factor(rope_scaling["factor"], rope_scaling.get("mscale_all_dim", 0.0))
    return m**2 / math.sqrt(qk_dim)


@dataclass(frozen=True)
class MlaInputs:
    """What both forms of attention read: queries, cache entries, the two up-projections head by head."""

    q_nope_THN: Array
    q_rope_THR: Array
    c_kv_TC: Array
    k_rope_TR: Array
    w_uk_HNC: Array
    w_uv_HVC: Array
    scale: float


def mla_inputs(config: Config, attn: Tensors, h_TD: Array) -> MlaInputs:
    """Eqs. 9 and 12 to 15, with the norms of section 3.1.2."""
    T, H = len(h_TD), config["num_attention_heads"]
    N, R, V, C = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    rope_scaling = config.get("rope_scaling")
    frequencies, ratio = yarn_frequencies(R, config["rope_theta"], rope_scaling), rotary_ratio(rope_scaling)
    q_nope, q_rope = np.zeros((T, H, N)), np.zeros((T, H, R))
    c_kv, k_rope = np.zeros((T, C)), np.zeros((T, R))
    for t, h in enumerate(h_TD):
        down = attn["kv_a_proj_with_mqa.weight"] @ h  # rows: latent, then the rotary key, which has no norm
        c_kv[t] = rms_norm(down[:C], attn["kv_a_layernorm.weight"], LATENT_NORM_EPS)
        k_rope[t] = ratio * rotate_interleaved(down[C:], t, frequencies)
        if config["q_lora_rank"] is None:
            q = attn["q_proj.weight"] @ h
        else:
            c_q = rms_norm(attn["q_a_proj.weight"] @ h, attn["q_a_layernorm.weight"], LATENT_NORM_EPS)
            q = attn["q_b_proj.weight"] @ c_q
        for i, q_head in enumerate(q.reshape(H, N + R)):  # rows of each head: nope, then rope
            q_nope[t, i] = q_head[:N]
            q_rope[t, i] = ratio * rotate_interleaved(q_head[N:], t, frequencies)
    w_kv_b = attn["kv_b_proj.weight"].reshape(H, N + V, C)  # rows of each head: key, then value
    scale = softmax_scale(N + R, rope_scaling)
    return MlaInputs(q_nope, q_rope, c_kv, k_rope, w_kv_b[:, :N], w_kv_b[:, N:], scale)


def mla_attention(
    form: Callable[[MlaInputs], Array], config: Config, attn: Tensors, h_TD: Array
) -> tuple[Array, tuple[Array, Array]]:
    """u [T, D] of eq. 19 and the cache entries; attn holds one layer's names below self_attn."""
    inputs = mla_inputs(config, attn, h_TD)
    u_TD = np.array([attn["o_proj.weight"] @ np.concatenate(o_HV) for o_HV in form(inputs)])
    return u_TD, (inputs.c_kv_TC, inputs.k_rope_TR)


def attention_expanded(x: MlaInputs) -> Array:
    """Eqs. 10, 11, 16 to 18: the keys and values of every head are rebuilt. Returns o [T, H, V]."""
    T, H, V = len(x.c_kv_TC), *x.w_uv_HVC.shape[:2]
    o_THV = np.zeros((T, H, V))
    for t in range(T):
        for i in range(H):
            q = np.concatenate([x.q_nope_THN[t, i], x.q_rope_THR[t, i]])
            logits = np.zeros(t + 1)
            for j in range(t + 1):
                k = np.concatenate([x.w_uk_HNC[i] @ x.c_kv_TC[j], x.k_rope_TR[j]])
                logits[j] = q @ k * x.scale
            p = softmax(logits)
            for j in range(t + 1):
                o_THV[t, i] += p[j] * (x.w_uv_HVC[i] @ x.c_kv_TC[j])
    return o_THV


def attention_absorbed(x: MlaInputs) -> Array:
    """The same with W^UK moved to the query and W^UV to the output (section 2.1.2). Returns o [T, H, V]."""
    T, H, V = len(x.c_kv_TC), *x.w_uv_HVC.shape[:2]
    o_THV = np.zeros((T, H, V))
    for t in range(T):
        for i in range(H):
            q_latent = x.w_uk_HNC[i].T @ x.q_nope_THN[t, i]
            logits = np.zeros(t + 1)
            for j in range(t + 1):
                logits[j] = (q_latent @ x.c_kv_TC[j] + x.q_rope_THR[t, i] @ x.k_rope_TR[j]) * x.scale
            p = softmax(logits)
            y = np.zeros_like(q_latent)
            for j in range(t + 1):
                y += p[j] * x.c_kv_TC[j]
            o_THV[t, i] = x.w_uv_HVC[i] @ y
    return o_THV


def gqa_attention(config: Config, attn: Tensors, h_TD: Array) -> tuple[Array, tuple[Array, Array]]:
    """Eqs. 1 to 8 with K key/value heads, each read by H/K query heads in a row; whole heads are rotated."""
    T, H, K = len(h_TD), config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // H
    frequencies = yarn_frequencies(width, config["rope_theta"], None)

    def project(name: str, num_heads: int) -> Array:
        bias = attn[f"{name}.bias"] if config["model_type"] == "qwen2" else 0.0
        return np.array([(attn[f"{name}.weight"] @ h + bias).reshape(num_heads, width) for h in h_TD])

    q, k, v = project("q_proj", H), project("k_proj", K), project("v_proj", K)
    for t in range(T):
        q[t] = [rotate_half_split(head, t, frequencies) for head in q[t]]
        k[t] = [rotate_half_split(head, t, frequencies) for head in k[t]]
    u_TD = np.zeros_like(h_TD)
    for t in range(T):
        o_HV = np.zeros((H, width))
        for i in range(H):
            n = i // (H // K)
            p = softmax(np.array([q[t, i] @ k[j, n] / math.sqrt(width) for j in range(t + 1)]))
            for j in range(t + 1):
                o_HV[i] += p[j] * v[j, n]
        u_TD[t] = attn["o_proj.weight"] @ np.concatenate(o_HV)
    return u_TD, (k, v)


def moe(config: Config, mlp: Tensors, u_TD: Array) -> tuple[Array, Routing]:
    """Eqs. 20 to 22 without the residual; mlp holds one layer's names below mlp."""
    # NOTE: the official V2 code multiplies by routed_scaling_factor only where it does not renormalise.
    gamma = 1.0 if renormalises(config) else config.get("routed_scaling_factor", 1.0)
    shape = len(u_TD), config["n_routed_experts"]
    out_TD, routing = np.zeros_like(u_TD), Routing(np.zeros(shape), [], np.zeros(shape))
    for t, u in enumerate(u_TD):
        s = softmax(np.array([u @ e_i for e_i in mlp["gate.weight"]]))
        chosen = choose_experts(config, s)
        g = gates(config, s, chosen)
        if config.get("n_shared_experts"):  # stored as one wide SwiGLU, not gated
            out_TD[t] += swiglu(mlp, "shared_experts.", u)
        for i in chosen:
            out_TD[t] += gamma * g[i] * swiglu(mlp, f"experts.{i}.", u)
        routing.scores[t], routing.gates[t] = s, g
        routing.chosen.append(set(chosen))
    return out_TD, routing


def largest(scores: Array, count: int, among: Iterable[int]) -> list[int]:
    """The `count` indices of `among` with the largest scores, best first; of equals the lowest index wins."""
    return sorted(among, key=lambda i: (-scores[i], i))[:count]


def choose_experts(config: Config, s_E: Array) -> list[int]:
    """TopK of eq. 21; group_limited_greedy keeps to the topk_group best of n_group groups (section 2.2.2)."""
    top_k, method = config["num_experts_per_tok"], config.get("topk_method", "greedy")
    if method == "greedy":
        return largest(s_E, top_k, range(len(s_E)))
    if method != "group_limited_greedy":
        raise ValueError(f"topk_method={method!r}: expected 'greedy' or 'group_limited_greedy'")
    groups = split_experts(len(s_E), config["n_group"])
    # NOTE: V2 scores a group by its maximum; the sum of its best two is V3's rule.
    group_scores = np.array([np.max(s_E[group]) for group in groups])
    kept = largest(group_scores, config["topk_group"], range(len(groups)))
    among = [i for g in kept for i in groups[g]]
    if len(among) < top_k:
        raise ValueError(f"topk_group={len(kept)} leaves {len(among)} experts: expected {top_k} or more")
    return largest(s_E, top_k, among)


def gates(config: Config, s_E: Array, chosen: Iterable[int]) -> Array:
    """Eq. 21: g_i = s_i if chosen, else 0. V2 does not make them sum to 1."""
    g_E = np.zeros_like(s_E)
    for i in chosen:
        g_E[i] = s_E[i]
    return g_E / np.sum(g_E) if renormalises(config) else g_E


def renormalises(config: Config) -> bool:
    """norm_topk_prob; but as in the official code one active expert keeps its probability (Switch)."""
    return config.get("norm_topk_prob", False) and config["num_experts_per_tok"] > 1


def split_experts(num_experts: int, num_groups: int) -> list[list[int]]:
    """Contiguous groups of equal size: one per device."""
    if num_experts % num_groups != 0:
        raise ValueError(f"n_routed_experts={num_experts} must be divisible by n_group={num_groups}")
    size = num_experts // num_groups
    return [list(range(size * g, size * (g + 1))) for g in range(num_groups)]


def expert_balance_loss(s_TE: Array, chosen: Sequence[set[int]], alpha: float) -> float:
    """Eqs. 23 to 25, one sequence: alpha * sum_i f_i P_i. Mean over the batch, sum over layers."""
    f, P = _expert_load(chosen, s_TE.shape[1]), np.mean(s_TE, axis=0)
    return float(alpha * sum(f[i] * P[i] for i in range(len(f))))


def device_balance_loss(s_TE: Array, chosen: Sequence[set[int]], num_groups: int, alpha: float) -> float:
    """Eqs. 26 to 28: alpha * sum_i f'_i P'_i; f' is a mean and P' a sum over the experts of device i."""
    f, P = _expert_load(chosen, s_TE.shape[1]), np.mean(s_TE, axis=0)
    devices = split_experts(s_TE.shape[1], num_groups)
    return float(alpha * sum(np.mean(f[device]) * np.sum(P[device]) for device in devices))


def communication_balance_loss(
    s_TE: Array, chosen: Sequence[set[int]], num_groups: int, max_groups: int, alpha: float
) -> float:
    """Eqs. 29 to 31: alpha * sum_i f''_i P''_i; f''_i = D/(M T) * tokens sent to device i."""
    P, loss = np.mean(s_TE, axis=0), 0.0
    for device in split_experts(s_TE.shape[1], num_groups):
        num_sent = sum(1 for experts in chosen if experts & set(device))  # with one or more experts there
        loss += num_groups / (max_groups * len(chosen)) * num_sent * np.sum(P[device])
    return float(alpha * loss)


def _expert_load(chosen: Sequence[set[int]], num_experts: int) -> Array:
    """f_i = N_r / (K_r T) * tokens that choose expert i."""
    T, top_k = len(chosen), len(chosen[0])
    counts = [sum(1 for experts in chosen if i in experts) for i in range(num_experts)]
    return np.array([num_experts / (top_k * T) * count for count in counts])
