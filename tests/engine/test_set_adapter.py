"""`LLM` with a LoRA adapter says what the adapted model says, and without it again what the model said before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv2 import adapters
from dsv2.engine.llm import LLM
from dsv2.engine.outputs import RequestOutput
from dsv2.engine.sampling import SamplingParams
from dsv2.kernels.backend import joined
from dsv2.model import Transformer
from dsv2.model.mla import MLA
from tests.adapted import edited_model, read_tensors, same, state, write_adapter, write_tensors
from tests.engine.recomputed import KINDS, prompts_of, recompute
from tests.numerics import SMALL_MODELS, random_model

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def new_llm(kind: str = "v2", **changes: Any) -> LLM:
    limits: dict[str, Any] = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(random_model(SMALL_MODELS[kind](), seed=3), **(limits | changes))


def says(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]


def recomputed(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    return [recompute(model, prompt, NUM_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_that_of_edited_weights(kind: str, tmp_path: Path) -> None:
    llm, prompts = new_llm(kind), prompts_of(kind)[:4]
    before = says(llm, prompts)
    adapter = write_adapter(tmp_path / "adapter", llm.engine.model)
    expected = recomputed(edited_model(llm.engine.model, adapter, tmp_path / "edited"), prompts)
    llm.set_adapter(adapter)
    assert says(llm, prompts) == expected != before


def test_an_llm_may_begin_with_an_adapter(tmp_path: Path) -> None:
    later, prompts = new_llm(), prompts_of("v2")[:2]
    adapter = write_adapter(tmp_path / "adapter", later.engine.model)
    later.set_adapter(adapter)
    assert says(new_llm(adapter=adapter), prompts) == says(later, prompts)


def test_taken_out_everything_is_as_it_was_bit_for_bit(tmp_path: Path) -> None:
    llm, prompts = new_llm(), prompts_of("v2")[:2]
    model = llm.engine.model
    before, said = state(model), says(llm, prompts)
    llm.set_adapter(write_adapter(tmp_path / "adapter", model))
    assert not same(state(model), before)
    llm.set_adapter(None)
    assert same(state(model), before)
    assert says(llm, prompts) == said


def test_joined_copies_are_refreshed_where_they_are(tmp_path: Path) -> None:
    llm = new_llm()
    places = [p.data_ptr() for p in llm.engine.model.parameters()]
    llm.set_adapter(write_adapter(tmp_path / "adapter", llm.engine.model))
    assert [p.data_ptr() for p in llm.engine.model.parameters()] == places
    attentions = [module for module in llm.engine.model.modules() if isinstance(module, MLA)]
    assert attentions
    assert all(joined(a.q_a_proj.weight, a.kv_a_proj_with_mqa.weight) is not None for a in attentions)


def test_another_adapter_replaces_the_first(tmp_path: Path) -> None:
    llm, alone = new_llm(), new_llm()
    first, second = (write_adapter(tmp_path / str(seed), llm.engine.model, seed=seed) for seed in (1, 2))
    llm.set_adapter(first)
    llm.set_adapter(second)
    alone.set_adapter(second)
    assert same(state(llm.engine.model), state(alone.engine.model))


def test_prefixes_are_not_shared_across_adapters(tmp_path: Path) -> None:
    llm, prompt = new_llm(), prompts_of("v2")[5]
    adapter = write_adapter(tmp_path / "adapter", llm.engine.model)

    def generate() -> RequestOutput:
        return llm.generate([prompt], GREEDY)[0]

    generate()
    assert generate().num_cached_tokens > 0
    for each in (adapter, None):
        llm.set_adapter(each)
        assert generate().num_cached_tokens == 0


def test_an_adapter_waits_for_requests_to_finish(tmp_path: Path) -> None:
    llm = new_llm()
    before = state(llm.engine.model)
    adapter = write_adapter(tmp_path / "adapter", llm.engine.model)
    request = llm.engine.add([5, 6, 7], GREEDY)
    with pytest.raises(ValueError, match="the engine has requests: let them finish"):
        llm.set_adapter(adapter)
    assert same(state(llm.engine.model), before)
    llm.engine.abort(request.id)
    llm.set_adapter(adapter)
    assert not same(state(llm.engine.model), before)


def test_a_refused_adapter_leaves_the_one_that_is_set(tmp_path: Path) -> None:
    llm = new_llm()
    llm.set_adapter(write_adapter(tmp_path / "good", llm.engine.model, seed=1))
    before = state(llm.engine.model)
    bad = write_adapter(tmp_path / "bad", llm.engine.model, seed=2)
    tensors = read_tensors(bad)
    last = list(tensors)[-1]
    write_tensors(bad, tensors | {last: tensors[last][:, :-1]})
    with pytest.raises(ValueError, match=f"{last} has shape"):
        llm.set_adapter(bad)
    assert same(state(llm.engine.model), before)


def test_a_merge_that_fails_midway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    before, original = state(llm.engine.model), adapters.Change.of
    adapter, num_merged = write_adapter(tmp_path / "adapter", llm.engine.model), 0

    def fail_at_20(change: adapters.Change, weight: Any) -> Any:
        nonlocal num_merged
        num_merged += 1
        if num_merged == 20:
            assert not same(state(llm.engine.model), before)
            raise MemoryError
        return original(change, weight)

    monkeypatch.setattr(adapters.Change, "of", fail_at_20)
    with pytest.raises(MemoryError):
        llm.set_adapter(adapter)
    assert same(state(llm.engine.model), before)
