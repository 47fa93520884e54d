"""What can be derived by hand about paper.py, the oracle: limits, symmetries, the paper's figures.

Paper: sections 2.1, 2.2 and 3.1.4. It does not test dsv2; the tests of dsv2 compare it with this oracle.
"""

import math
from typing import Any

import numpy as np
import pytest

from tests.paper import layout, paper

PLAIN: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 7,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
YARN_V25 = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
V2 = {**PLAIN, "rope_scaling": YARN}
LITE = {**V2, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "rope_theta": 1e6}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def weights(config: layout.Config) -> dict[str, layout.Array]:
    return paper.random_tensors(config, seed=0, std=0.3)


def run(config: layout.Config, tokens: list[int]) -> paper.Result:
    model = paper.forward if config["model_type"] == "deepseek_v2" else paper.gqa_forward
    return model(config, weights(config), tokens)


def under(prefix: str, tensors: layout.Tensors) -> dict[str, layout.Array]:
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}


def normed(config: layout.Config, tensors: layout.Tensors) -> layout.Array:
    """What the attention of layer 0 reads, [T, D]."""
    gain = tensors["model.layers.0.input_layernorm.weight"]
    rows = [tensors["model.embed_tokens.weight"][token] for token in TOKENS]
    return np.array([x / math.sqrt(np.mean(x * x) + config["rms_norm_eps"]) * gain for x in rows])


@pytest.mark.parametrize("config", [PLAIN, V2, LITE], ids=["plain", "v2", "lite"])
def test_absorbed_attention_equals_expanded(config):
    tensors = weights(config)
    expanded = paper.forward(config, tensors, TOKENS, absorbed=False).logits
    absorbed = paper.forward(config, tensors, TOKENS, absorbed=True).logits
    np.testing.assert_allclose(absorbed, expanded, rtol=0, atol=1e-12)


def test_each_head_of_the_query_is_nope_then_rope():
    tensors = weights(LITE)
    attn, h = under("model.layers.0.self_attn.", tensors), normed(LITE, tensors)
    x = paper.mla_inputs(LITE, attn, h)
    heads = np.concatenate([x.q_nope_THN[0], x.q_rope_THR[0]], axis=1)  # position 0 turns nothing
    np.testing.assert_allclose(heads.reshape(-1), attn["q_proj.weight"] @ h[0], rtol=0, atol=1e-12)


def test_rotary_scores_of_equal_inputs_depend_on_distance_only():
    tensors = weights(V2)
    h = np.tile(normed(V2, tensors)[0], (8, 1))
    x = paper.mla_inputs(V2, under("model.layers.0.self_attn.", tensors), h)
    scores = np.einsum("thr,sr->hts", x.q_rope_THR, x.k_rope_TR)
    np.testing.assert_allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=0, atol=1e-12)


def test_attention_without_queries_is_the_running_mean_of_the_values():
    tensors = weights(V2)
    attn = under("model.layers.0.self_attn.", tensors)
    attn["q_b_proj.weight"] = np.zeros_like(attn["q_b_proj.weight"])
    x = paper.mla_inputs(V2, attn, normed(V2, tensors))
    w_value = attn["kv_b_proj.weight"].reshape(3, 6 + 5, 12)[:, 6:]
    values = np.einsum("hvc,tc->thv", w_value, x.c_kv_TC)
    counts = np.arange(1, len(TOKENS) + 1)[:, None, None]
    means = np.cumsum(values, axis=0) / counts
    np.testing.assert_allclose(paper.attention_expanded(x), means, rtol=0, atol=1e-12)


def test_the_cached_latent_is_normalised():
    c_kv, _ = run(V2, TOKENS).cache[0]
    direction = c_kv / weights(V2)["model.layers.0.self_attn.kv_a_layernorm.weight"]
    np.testing.assert_allclose(np.mean(direction**2, axis=1), 1.0, rtol=1e-5)


def test_the_latent_norm_ignores_rms_norm_eps():
    tensors = weights(V2)
    attn, h = under("model.layers.0.self_attn.", tensors), normed(V2, tensors)
    c_kv, other = (paper.mla_inputs({**V2, "rms_norm_eps": eps}, attn, h).c_kv_TC for eps in (1e-6, 0.1))
    np.testing.assert_array_equal(other, c_kv)


def test_the_cached_rotary_key_is_a_rotated_projection_of_the_layer_input_without_a_norm():
    tensors = weights(V2)
    key = normed(V2, tensors) @ tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][12:].T
    _, k_rope = run(V2, TOKENS).cache[0]
    np.testing.assert_allclose(k_rope[0], key[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(k_rope, axis=1), np.linalg.norm(key, axis=1), rtol=1e-12)


@pytest.mark.parametrize("config", [V2, LLAMA, QWEN2, MIXTRAL], ids=["v2", "llama", "qwen2", "mixtral"])
def test_changing_the_last_token_changes_no_earlier_logits(config):
    before, after = run(config, TOKENS).logits, run(config, [*TOKENS[:-1], 7]).logits
    np.testing.assert_allclose(after[:-1], before[:-1], rtol=0, atol=1e-12)
    assert np.max(np.abs(after[-1] - before[-1])) > 1e-3


def test_a_dense_layer_with_silent_attention_is_one_residual_ffn_between_two_norms():
    config = {**V2, "num_hidden_layers": 1}
    w = weights(config)
    w["model.layers.0.self_attn.o_proj.weight"] = np.zeros((16, 15))
    x = w["model.embed_tokens.weight"][3]
    u = x / np.sqrt(np.mean(x * x) + 1e-6) * w["model.layers.0.post_attention_layernorm.weight"]
    x = x + paper.swiglu(under("model.layers.0.mlp.", w), "", u)
    y = x / np.sqrt(np.mean(x * x) + 1e-6) * w["model.norm.weight"]
    np.testing.assert_allclose(paper.forward(config, w, [3]).logits[0], w["lm_head.weight"] @ y, atol=1e-12)


def test_swiglu_gates_the_up_projection_with_silu():
    scalars = {"gate": math.log(3), "up": 2.0, "down": 5.0}
    tensors = {f"{name}_proj.weight": np.array([[value]]) for name, value in scalars.items()}
    assert paper.swiglu(tensors, "", np.ones(1))[0] == pytest.approx(5 * (0.75 * math.log(3)) * 2)


def test_interleaved_rotation_is_complex_multiplication():
    x, frequencies = np.random.default_rng(0).standard_normal(8), paper.yarn_frequencies(8, 10000.0, None)
    expected = (x.view(np.complex128) * np.exp(1j * 5 * frequencies)).view(np.float64)
    np.testing.assert_allclose(paper.rotate_interleaved(x, 5, frequencies), expected, rtol=0, atol=1e-14)


def test_half_split_rotation_is_the_interleaved_one_of_reordered_channels():
    x, frequencies = np.random.default_rng(0).standard_normal(8), paper.yarn_frequencies(8, 10000.0, None)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    interleaved = paper.rotate_interleaved(x[order], 5, frequencies)
    np.testing.assert_array_equal(paper.rotate_half_split(x, 5, frequencies)[order], interleaved)


def test_yarn_ramps_from_pair_10_to_pair_23():
    assert paper.yarn_range(64, 10000.0, YARN) == (10, 23)


def test_yarn_keeps_fast_pairs_divides_slow_ones_by_40_and_blends_between():
    plain = np.array([10000.0 ** (-2 * i / 64) for i in range(32)])
    ratio = paper.yarn_frequencies(64, 10000.0, YARN) / plain
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-12)
    np.testing.assert_allclose(ratio[11:23], [1 - k / 13 * 39 / 40 for k in range(1, 13)], rtol=1e-12)


@pytest.mark.parametrize(
    ("rope_scaling", "scale"),
    [(YARN, 0.114721), (YARN_V25, 0.135234), (None, 0.0721688)],
    ids=["v2", "v2.5", "4k"],
)
def test_softmax_scale_is_the_one_of_the_checkpoint(rope_scaling, scale):
    assert paper.softmax_scale(192, rope_scaling) == pytest.approx(scale, rel=5e-6)


def test_rotary_ratio_is_one_only_when_both_mscales_agree():
    assert paper.rotary_ratio(YARN) == 1.0
    assert paper.rotary_ratio({**YARN, "mscale": 1.0}) == pytest.approx(1.36889 / 1.26080, rel=1e-5)


def test_mscale_changes_logits_from_position_1_on_but_not_at_0():
    change = np.abs(run(V2, TOKENS).logits - run({**V2, "rope_scaling": YARN_V25}, TOKENS).logits).max(axis=1)
    assert change[0] < 1e-12
    assert np.all(change[1:] > 1e-6)


def test_group_limited_routing_touches_at_most_topk_group_groups():
    rng = np.random.default_rng(0)
    scores = [paper.softmax(rng.standard_normal(8)) for _ in range(50)]
    free = {**V2, "topk_method": "greedy"}
    assert max(len({i // 2 for i in paper.choose_experts(free, s)}) for s in scores) == 3
    assert max(len({i // 2 for i in paper.choose_experts(V2, s)}) for s in scores) == 2


def test_a_group_is_scored_by_its_maximum_not_by_the_sum_of_its_best_two():
    s = np.array([0.40, 0.01, 0.25, 0.24, 0.05, 0.03, 0.01, 0.01])
    config = {**V2, "topk_group": 1, "num_experts_per_tok": 2}
    assert paper.choose_experts(config, s) == [0, 1]


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_of_equal_scores_the_lowest_index_wins(method):
    assert paper.choose_experts({**V2, "topk_method": method}, np.full(8, 0.125)) == [0, 1, 2]


def test_only_layers_from_first_k_dense_replace_on_are_routed():
    assert list(run(V2, TOKENS).routing) == [1, 2]


def test_scores_are_a_softmax_over_all_experts():
    for routing in run(V2, TOKENS).routing.values():
        assert routing.scores.min() > 0
        np.testing.assert_allclose(routing.scores.sum(axis=1), 1.0, rtol=1e-12)


def test_gates_are_the_scores_of_the_chosen_and_sum_below_one():
    for routing in run(V2, TOKENS).routing.values():
        for s, chosen, g in zip(routing.scores, routing.chosen, routing.gates, strict=True):
            np.testing.assert_array_equal(g, [s[i] if i in chosen else 0.0 for i in range(8)])
            assert len(chosen) == 3
            assert g.sum() < 1


def test_norm_topk_prob_makes_gates_sum_to_one_and_drops_the_routed_scale():
    config = {**V2, "norm_topk_prob": True}
    tensors = weights(config)
    result = paper.forward(config, tensors, TOKENS)
    np.testing.assert_allclose(result.routing[1].gates.sum(axis=1), 1.0, rtol=1e-12)
    unscaled = paper.forward({**config, "routed_scaling_factor": 1.0}, tensors, TOKENS)
    np.testing.assert_array_equal(result.logits, unscaled.logits)


def test_a_single_active_expert_keeps_its_probability_as_gate():
    config = {**LITE, "num_experts_per_tok": 1, "norm_topk_prob": True}
    routing = run(config, TOKENS).routing[1]
    np.testing.assert_array_equal(routing.gates.max(axis=1), routing.scores.max(axis=1))


def test_routed_output_is_linear_in_the_scale_and_shared_experts_are_outside_it():
    mlp = under("model.layers.1.mlp.", weights(V2))
    u = np.random.default_rng(1).standard_normal((4, 16))
    configs = [{**V2, "routed_scaling_factor": scale} for scale in (0.0, 1.0, 16.0)]
    at_0, at_1, at_16 = (paper.moe(config, mlp, u)[0] for config in configs)
    np.testing.assert_allclose(at_16 - at_0, 16 * (at_1 - at_0), rtol=0, atol=1e-11)
    shared = np.array([paper.swiglu(mlp, "shared_experts.", x) for x in u])
    np.testing.assert_array_equal(at_0, shared)


def test_identical_experts_give_one_expert_times_the_sum_of_the_gates():
    mlp = under("model.layers.1.mlp.", weights(V2))
    for name in [n for n in mlp if n.startswith("experts.")]:
        mlp[name] = mlp["experts.0." + name.split(".", 2)[2]]
    u = np.random.default_rng(1).standard_normal((4, 16))
    out, routing = paper.moe({**V2, "n_shared_experts": None}, mlp, u)
    expert = np.array([paper.swiglu(mlp, "experts.0.", x) for x in u])
    total_gate = routing.gates.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out, 16 * total_gate * expert, rtol=0, atol=1e-12)


def test_balance_losses_at_perfect_balance_are_their_coefficients():
    s, chosen = (
        np.full((8, 8), 1 / 8),
        [{t, (t + 2) % 8} for t in range(8)],
    )  # two devices of two experts a token
    assert paper.expert_balance_loss(s, chosen, 0.003) == pytest.approx(0.003, rel=1e-12)
    assert paper.device_balance_loss(s, chosen, 4, 0.05) == pytest.approx(0.05, rel=1e-12)
    assert paper.communication_balance_loss(s, chosen, 4, 2, 0.02) == pytest.approx(0.02, rel=1e-12)


def test_balance_losses_of_a_collapsed_router_are_as_computed_by_hand():
    s, chosen = np.array([[0.7, 0.1, 0.1, 0.1]] * 2), [{0}, {0}]
    assert paper.expert_balance_loss(s, chosen, 1.0) == pytest.approx(4 * 0.7)  # f = 4, 0, 0, 0
    assert paper.device_balance_loss(s, chosen, 2, 1.0) == pytest.approx(2 * 0.8)  # f' = 2, 0
    assert paper.communication_balance_loss(s, chosen, 2, 2, 1.0) == pytest.approx(1 * 0.8)  # f'' = 1, 0


def test_communication_counts_a_token_once_per_device():
    s = np.full((1, 4), 0.25)
    assert paper.communication_balance_loss(s, [{0, 1}], 2, 1, 1.0) == pytest.approx(2 * 0.5)
    assert paper.communication_balance_loss(s, [{0, 2}], 2, 1, 1.0) == pytest.approx(2 * 0.5 + 2 * 0.5)


def test_cross_entropy_is_the_mean_in_nats():
    logits = np.log([[1.0, 3.0], [1.0, 1.0]])
    assert paper.cross_entropy(logits, [1, 0]) == pytest.approx((-math.log(0.75) - math.log(0.5)) / 2)


def test_cross_entropy_survives_large_logits():
    assert paper.cross_entropy(np.array([[1000.0, 0.0]]), [1]) == 1000.0


def test_gqa_equals_mha_with_repeated_key_and_value_heads():
    grouped = weights(LLAMA)
    full = dict(grouped)
    for name in [n for n in grouped if "k_proj" in n or "v_proj" in n]:
        full[name] = np.repeat(grouped[name].reshape(2, 4, 16), 2, axis=0).reshape(16, 16)
    expected = paper.gqa_forward({**LLAMA, "num_key_value_heads": 4}, full, TOKENS).logits
    np.testing.assert_allclose(paper.gqa_forward(LLAMA, grouped, TOKENS).logits, expected, rtol=0, atol=1e-12)


def test_a_value_bias_adds_its_projection_to_the_attention_output():
    tensors = weights(QWEN2)
    attn = under("model.layers.0.self_attn.", tensors)
    h = normed(QWEN2, tensors)
    without = paper.gqa_attention(QWEN2, {**attn, "v_proj.bias": np.zeros(8)}, h)[0]
    shift = attn["o_proj.weight"] @ np.repeat(attn["v_proj.bias"].reshape(2, 4), 2, axis=0).reshape(-1)
    change = paper.gqa_attention(QWEN2, attn, h)[0] - without
    np.testing.assert_allclose(change, np.tile(shift, (9, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_query_and_key_biases_of_qwen2_matter(name):
    tensors = weights(QWEN2)
    unbiased = {n: np.zeros_like(w) if n.endswith(f"{name}.bias") else w for n, w in tensors.items()}
    before, after = (paper.gqa_forward(QWEN2, w, TOKENS).logits for w in (tensors, unbiased))
    assert np.max(np.abs(after[1:] - before[1:])) > 1e-6


def test_mixtral_gates_are_the_softmax_of_the_two_chosen_logits():
    routing = run(MIXTRAL, TOKENS).routing[0]
    for s, chosen, g in zip(routing.scores, routing.chosen, routing.gates, strict=True):
        best, second = sorted(chosen, key=lambda i: -s[i])
        margin = math.log(s[best]) - math.log(s[second])
        assert g[best] == pytest.approx(1 / (1 + math.exp(-margin)), rel=1e-12)
        assert g[second] == pytest.approx(1 / (1 + math.exp(margin)), rel=1e-12)


def test_deepseekmoe_with_dense_layers_only_is_llama():
    config = {**LLAMA, "model_type": "deepseek", "n_routed_experts": 8, "first_k_dense_replace": 2}
    tensors = weights(config)
    result = paper.gqa_forward(config, tensors, TOKENS)
    np.testing.assert_array_equal(result.logits, paper.gqa_forward(LLAMA, tensors, TOKENS).logits)


def test_float32_weights_are_refused():
    tensors = {**weights(V2), "lm_head.weight": np.zeros((24, 16), dtype=np.float32)}
    with pytest.raises(ValueError, match="lm_head.weight is float32: expected float64"):
        paper.forward(V2, tensors, TOKENS)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"topk_method": "noaux_tc"}, {"scoring_func": "sigmoid"}], ids=str)
def test_routing_rules_outside_the_paper_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        run({**V2, **change}, TOKENS)
