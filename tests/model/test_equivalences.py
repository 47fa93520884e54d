"""One function, however it is computed: absorbed or expanded, cached or whole, packed or one by one."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsv2 import weights
from dsv2.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from dsv2.model import Cache, Context, Transformer
from tests.numerics import (
    SMALL_MODELS,
    assert_close,
    assert_gradients_close,
    gqa_config,
    gradients,
    mla_config,
    random_model,
    random_tokens,
)

MLA_MODELS = ["v2", "v2-lite", "v2-plain-rope"]
LENGTHS = [33, 1, 17, 8, 17]  # ragged, with equal lengths that do not lie side by side

# How many tokens of each of three sequences a step feeds: all at once, in chunks, token by token, and mixed.
SCHEDULES = {
    "prefill": [(20, 9, 1)],
    "prefill-then-decode": [(12, 5, 1), *[(1, 1, 0)] * 4, *[(1, 0, 0)] * 4],
    "decode-only": [(1, 1, 1), *[(1, 1, 0)] * 8, *[(1, 0, 0)] * 11],
    "chunked": [(7, 0, 0), (7, 5, 0), (2, 2, 1), (2, 2, 0), (2, 0, 0)],
    "sequences-join-late": [(19, 0, 0), (1, 8, 0), (0, 1, 1)],
}
FORMS = {"expanded": [False], "absorbed": [True], "alternating": [False, True]}


@pytest.fixture(params=SMALL_MODELS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(SMALL_MODELS[request.param]())


def separately(model: Transformer, tokens_T: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([model(document) for document in tokens_T.split(list(lengths))])


def bounds(lengths: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def through_cache(
    model: Transformer,
    cache: Cache,
    sequences: Sequence[Tensor],
    schedule: Sequence[tuple[int, ...]],
    absorb: list[bool],
) -> list[Tensor]:
    """Logits of every sequence, fed as the schedule says, alternating between the given forms."""
    fed = [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for step, counts in enumerate(schedule):
        rows = [s[f : f + n] for s, f, n in zip(sequences, fed, counts, strict=True)]
        context = cache.extend(counts, absorb=absorb[step % len(absorb)])
        for mine, new in zip(logits, model(torch.cat(rows), context=context).split(list(counts)), strict=True):
            mine.append(new)
        fed = [f + n for f, n in zip(fed, counts, strict=True)]
    assert fed == [len(s) for s in sequences]
    return [torch.cat(mine) for mine in logits]


def poisoned(cache: Cache) -> Cache:
    """Every element that nobody has written must not be read."""
    for layer in cache.layers:
        layer.fill_(float("nan"))
    return cache


# Packing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model: Transformer) -> None:
    tokens_T = random_tokens(model.cfg, sum(LENGTHS))
    assert_close(model(tokens_T, bounds(LENGTHS)), separately(model, tokens_T, LENGTHS))


@torch.no_grad()
@pytest.mark.parametrize("name", MLA_MODELS)
def test_packed_documents_equal_separate_ones_when_absorbed(name: str) -> None:
    model = random_model(SMALL_MODELS[name]())
    tokens_T = random_tokens(model.cfg, sum(LENGTHS))
    context = Context.packed(bounds(LENGTHS), absorb=True)
    assert_close(model(tokens_T, context=context), separately(model, tokens_T, LENGTHS))


@torch.no_grad()
def test_no_bounds_mean_one_document(model: Transformer) -> None:
    tokens_T = random_tokens(model.cfg, 33)
    assert torch.equal(model(tokens_T), model(tokens_T, torch.tensor([0, 33])))


@torch.no_grad()
def test_empty_documents_change_nothing(model: Transformer) -> None:
    tokens_T = random_tokens(model.cfg, 9)
    assert torch.equal(model(tokens_T, [0, 0, 5, 5, 5, 9, 9]), model(tokens_T, [0, 5, 9]))


@torch.no_grad()
def test_no_token_sees_a_later_one(model: Transformer) -> None:
    tokens_T = random_tokens(model.cfg, 33)
    changed_T = tokens_T.clone()
    changed_T[20:] = (changed_T[20:] + 1) % model.cfg.vocab_size
    before, after = model(tokens_T), model(changed_T)
    assert_close(after[:20], before[:20])
    assert not torch.allclose(after[20:], before[20:])


@torch.no_grad()
def test_the_first_token_is_seen_by_the_last(model: Transformer) -> None:
    tokens_T = random_tokens(model.cfg, 33)
    changed_T = tokens_T.clone()
    changed_T[0] = (changed_T[0] + 1) % model.cfg.vocab_size
    assert not torch.allclose(model(changed_T)[-1], model(tokens_T)[-1], rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
def test_no_tokens_give_no_logits(model: Transformer, absorb: bool) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    cached = Cache(model.cfg, num_slots=2, capacity=4).extend([0, 0], absorb)
    for context in (Context.packed([0], absorb=absorb), cached):
        assert model(empty, context=context).shape == (0, model.cfg.vocab_size)


def test_no_tokens_have_zero_gradients() -> None:
    model = random_model(mla_config())
    model(torch.empty(0, dtype=torch.int64), cu_seqlens=[0]).sum().backward()
    assert not any(g.any() for g in gradients(model.named_parameters()).values())


# Absorbed and expanded --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MLA_MODELS)
def test_absorbed_attention_equals_expanded(name: str) -> None:
    model = random_model(SMALL_MODELS[name]())
    tokens_T = random_tokens(model.cfg, 65)
    assert_close(model(tokens_T, context=Context.packed([0, 40, 65], absorb=True)), model(tokens_T, [0, 40, 65]))


@pytest.mark.parametrize("name", MLA_MODELS)
def test_absorbed_attention_has_the_gradients_of_the_expanded(name: str) -> None:
    found = []
    for absorb in (True, False):
        model = random_model(SMALL_MODELS[name]())
        cotangent = torch.randn(40, model.cfg.vocab_size, generator=torch.Generator().manual_seed(1))
        model(random_tokens(model.cfg, 40), context=Context.packed([0, 40], absorb=absorb)).backward(cotangent)
        found.append(gradients(model.named_parameters()))
    assert_gradients_close(*found)


@torch.no_grad()
def test_values_may_be_wider_than_keys() -> None:
    wide = MLAConfig(q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=24)
    model = random_model(mla_config(attention=wide))
    tokens_T = random_tokens(model.cfg, 33)
    assert_close(model(tokens_T), model(tokens_T, context=Context.packed([0, 33], absorb=True)))


# Cached and whole -------------------------------------------------------------------------------------------------


CACHED = [
    pytest.param(name, form, schedule, id=f"{name}-{form}-{schedule}")
    for name in SMALL_MODELS
    for form in FORMS
    for schedule in SCHEDULES
    if name in MLA_MODELS or form == "expanded"
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "form", "schedule"), CACHED)
def test_cached_steps_equal_the_whole_sequence(name: str, form: str, schedule: str) -> None:
    model = random_model(SMALL_MODELS[name]())
    sequences = [random_tokens(model.cfg, n, seed=n) for n in (20, 9, 1)]
    cache = poisoned(Cache(model.cfg, num_slots=3, capacity=24))
    found = through_cache(model, cache, sequences, SCHEDULES[schedule], FORMS[form])
    for mine, tokens in zip(found, sequences, strict=True):
        assert_close(mine, model(tokens))


PAGES = [(63, 60, 59), (1, 1, 1), (3, 3, 3), (0, 3, 3), (63, 0, 0)]  # they end before, at and behind a page's end


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["v2", "v2-lite", "llama"])
def test_pages_may_lie_in_any_order(name: str, form: str) -> None:
    model = random_model(SMALL_MODELS[name]())
    sequences = [random_tokens(model.cfg, sum(counts), seed=i) for i, counts in enumerate(zip(*PAGES, strict=True))]
    cache = poisoned(Cache(model.cfg, num_slots=3, capacity=130))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    cache.page_table = order.int().view(3, 3)
    absorb = FORMS[form] if model.cfg.attention.kind == "mla" else [False]
    for mine, tokens in zip(through_cache(model, cache, sequences, PAGES, absorb), sequences, strict=True):
        assert_close(mine, model(tokens))


@torch.no_grad()
def test_a_step_writes_its_own_rows_and_nothing_else(model: Transformer) -> None:
    cache = poisoned(Cache(model.cfg, num_slots=2, capacity=70))
    model(random_tokens(model.cfg, 67), context=cache.extend([66, 1]))
    for layer in cache.layers:
        slots = layer.unflatten(0, (2, 2)).flatten(1, 2)
        assert slots[0, :66].isfinite().all()
        assert slots[1, :1].isfinite().all()
        assert slots[0, 66:].isnan().all()
        assert slots[1, 1:].isnan().all()


@torch.no_grad()
def test_a_full_cache_refuses_more_tokens_and_stays_as_it_was() -> None:
    cache = Cache(mla_config(), num_slots=2, capacity=4)
    cache.extend([4, 1])
    with pytest.raises(ValueError, match=r"slot 0: 4 \+ 1 tokens exceed the cache capacity 4"):
        cache.extend([1, 1])
    assert cache.lengths == [4, 1]


def test_a_cache_wants_a_count_for_every_slot() -> None:
    with pytest.raises(ValueError, match="1 counts for 2 slots"):
        Cache(mla_config(), num_slots=2, capacity=4).extend([1])


def test_a_cache_cannot_be_extended_by_a_negative_count() -> None:
    with pytest.raises(ValueError, match="slot 1: num_new=-1 must not be negative"):
        Cache(mla_config(), num_slots=2, capacity=4).extend([1, -1])


@pytest.mark.parametrize(("num_slots", "capacity"), [(0, 4), (2, 0)])
def test_an_empty_cache_is_refused(num_slots: int, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_slots} x {capacity}"):
        Cache(mla_config(), num_slots=num_slots, capacity=capacity)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 8])
def test_steps_of_few_equal_counts_read_the_pages_of_a_sequence_once(count: int) -> None:
    cache = Cache(mla_config(), num_slots=3, capacity=80)
    cache.extend([70, 0, 9], absorb=True)
    paged = cache.extend([count, 0, count], absorb=True).paged
    assert paged is not None
    assert paged.lengths.tolist() == [70 + count, 9 + count]
    assert paged.page_table.tolist() == [[0, 1], [4, 5]]


@torch.no_grad()
def test_mla_caches_the_normalised_latent_and_the_rotated_shared_key() -> None:
    model = random_model(mla_config())
    cache = Cache(model.cfg, num_slots=1, capacity=9)
    model(random_tokens(model.cfg, 9), context=cache.extend([9]))
    latents = cache.layers[0][0, :9, :32]
    gain = model.get_parameter("model.layers.0.self_attn.kv_a_layernorm.weight")
    assert cache.layers[0].shape == (1, 64, 32 + 8)
    assert_close((latents / gain).square().mean(-1).sqrt(), torch.ones(9))


# Limits -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_advertised_length_changes_no_bit(model: Transformer) -> None:
    tokens_T = random_tokens(model.cfg, 40)
    other = random_model(model.cfg.replace(max_position_embeddings=8))
    assert torch.equal(model(tokens_T), other(tokens_T))


@torch.no_grad()
@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
def test_capacity_and_number_of_slots_change_no_bit(model: Transformer, absorb: bool) -> None:
    tokens = random_tokens(model.cfg, 12)
    schedule = [(7,), (1,), (4,)]

    def logits(num_slots: int, capacity: int) -> Tensor:
        cache = Cache(model.cfg, num_slots=num_slots, capacity=capacity)
        idle = (0,) * (num_slots - 1)
        steps = [(*n, *idle) for n in schedule]
        return through_cache(model, cache, [tokens, *[tokens[:0] for _ in idle]], steps, [absorb])[0]

    small = logits(1, 12)
    assert torch.equal(logits(1, 500), small)
    assert torch.equal(logits(7, 12), small)


# Models that are each other ---------------------------------------------------------------------------------------


def with_weights_of(source: Transformer, cfg: ModelConfig, rename: dict[str, str]) -> Transformer:
    """A model of `cfg` filled by checkpoint name; `rename` maps pieces of its names to pieces of the source's."""
    target = Transformer(cfg)
    theirs, parameters = weights.name_table(source.cfg, source), dict(source.named_parameters())
    mine = dict(target.named_parameters())
    for name, slot in weights.name_table(cfg, target).items():
        for piece, other in rename.items():
            name = name.replace(piece, other)
        slot.of(mine[slot.parameter]).data.copy_(theirs[name].of(parameters[theirs[name].parameter]))
    return target.eval()


@torch.no_grad()
def test_deepseekmoe_without_experts_is_llama() -> None:
    llama = random_model(gqa_config("llama"))
    dense = with_weights_of(llama, gqa_config("deepseek", moe=None), {})
    tokens_T = random_tokens(llama.cfg, 33)
    assert torch.equal(dense(tokens_T), llama(tokens_T))


@torch.no_grad()
def test_deepseekmoe_with_two_renormalised_experts_and_none_shared_is_mixtral() -> None:
    mixtral = random_model(gqa_config("mixtral"))
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_intermediate_size=96, norm_topk_prob=True)
    rename = {
        **{"mlp.experts": "block_sparse_moe.experts", "mlp.gate.": "block_sparse_moe.gate."},
        **{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    }
    deepseek = with_weights_of(mixtral, gqa_config("deepseek", moe=moe), rename)
    tokens_T = random_tokens(mixtral.cfg, 33)
    assert torch.equal(deepseek(tokens_T), mixtral(tokens_T))


@torch.no_grad()
def test_qwen2_with_zero_biases_is_llama() -> None:
    llama = random_model(gqa_config("llama"))
    qwen = Transformer(gqa_config("qwen2"))
    qwen.init_weights()
    qwen.load_state_dict(llama.state_dict() | {n: p for n, p in qwen.state_dict().items() if n.endswith("bias")})
    tokens_T = random_tokens(llama.cfg, 33)
    assert_close(qwen(tokens_T), llama(tokens_T))


@torch.no_grad()
def test_gqa_is_mha_with_repeated_heads() -> None:
    gqa = random_model(gqa_config("llama", num_kv_heads=2))
    mha = Transformer(gqa_config("llama", num_kv_heads=4))
    state = dict(gqa.state_dict())
    for name in [n for n in state if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    mha.load_state_dict(state)
    tokens_T = random_tokens(gqa.cfg, 33)
    assert_close(gqa(tokens_T), mha(tokens_T))


@torch.no_grad()
def test_tied_embeddings_are_the_output_projection() -> None:
    tied = random_model(gqa_config("llama", tie_embeddings=True))
    untied = Transformer(gqa_config("llama"))
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.model.embed_tokens.weight})
    tokens_T = random_tokens(tied.cfg, 33)
    assert torch.equal(tied(tokens_T), untied(tokens_T))


# Input that makes no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 512, 10**9])
def test_a_token_outside_the_vocabulary_is_named(token: int) -> None:
    model = random_model(mla_config())
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 512"):
        model(torch.tensor([3, token, 5]))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3], "the context describes 3 tokens, got 5"),
        ([0, 7], "the context describes 7 tokens, got 5"),
        ([1, 5], r"cu_seqlens must start at 0 and never fall, got \[1, 5\]"),
        ([0, 4, 2, 5], "cu_seqlens must start at 0 and never fall"),
        ([], "cu_seqlens must start at 0 and never fall"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(cu_seqlens: list[int], message: str) -> None:
    model = random_model(mla_config())
    with pytest.raises(ValueError, match=message):
        model(torch.arange(5), cu_seqlens)


def test_bounds_and_a_context_together_are_refused() -> None:
    model = random_model(mla_config())
    with pytest.raises(ValueError, match="give cu_seqlens or context, not both"):
        model(torch.arange(5), [0, 5], Context.packed([0, 5]))


def test_a_batch_instead_of_packed_tokens_is_refused() -> None:
    model = random_model(mla_config())
    with pytest.raises(ValueError, match=r"tokens must be packed \[T\], got shape \(2, 3\)"):
        model(torch.zeros(2, 3, dtype=torch.int64))


def test_new_weights_have_the_configured_deviation_and_neutral_norms() -> None:
    cfg = dataclasses.replace(gqa_config("qwen2"), initializer_std=0.05, vocab_size=4096)
    model = Transformer(cfg)
    model.init_weights(torch.Generator().manual_seed(0))
    assert isinstance(cfg.attention, GQAConfig)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.01)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name


def test_new_weights_repeat_with_the_generator() -> None:
    first, second = Transformer(mla_config()), Transformer(mla_config())
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
