"""The engine on a CUDA device, with its graphs and kernels, against the trainer's forward pass over the same tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dsv2.config import EngineConfig, ModelConfig
from dsv2.engine.core import Engine
from dsv2.engine.llm import LLM
from dsv2.engine.sampling import SamplingParams
from dsv2.model import Context, Transformer
from dsv2.model.moe import Experts
from tests.numerics import random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_PROMPTS, PROMPT_LEN, OUTPUT_LEN = 8, 200, 64


def model(dtype: torch.dtype) -> Transformer:
    """Official head widths at a toy size."""
    tiny = ModelConfig.preset("tiny")
    wide = dataclasses.replace(
        tiny.attention, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512
    )
    return random_model(tiny.replace(attention=wide), seed=0, std=0.1).to("cuda", dtype)


def answers(trained: Transformer) -> list[tuple[list[int], list[float]]]:
    """Ids of prompt and output, and the engine's log-probability of each but the first, all prompts side by side."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, trained.cfg.vocab_size, (NUM_PROMPTS, PROMPT_LEN), generator=generator).tolist()
    params = SamplingParams(
        max_tokens=OUTPUT_LEN, temperature=1, seed=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    llm = LLM(trained, max_model_len=512, num_pages=64)
    found = []
    for output in llm.generate(prompts, params):
        (completion,) = output.outputs
        of_prompt = (output.prompt_logprobs or [])[1:]
        each = [*zip(output.prompt_token_ids[1:], of_prompt, strict=True)]
        each += zip(completion.token_ids, completion.logprobs or [], strict=True)
        found.append(
            (output.prompt_token_ids + completion.token_ids, [at[i].logprob for i, at in each if at is not None])
        )
    return found


def trainers(trained: Transformer, ids: list[int]) -> Tensor:
    """Log-probability of each token but the first, [T - 1] on the CPU."""
    tokens = torch.tensor(ids, device="cuda")
    log_probs = trained(tokens).detach().float().log_softmax(-1)
    return log_probs[:-1].gather(1, tokens[1:, None]).squeeze(1).cpu()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"])
def test_log_probabilities_equal_the_trainers(dtype: torch.dtype, limit: float) -> None:
    trained = model(dtype)
    for ids, log_probs in answers(trained):
        assert (torch.tensor(log_probs) - trainers(trained, ids)).abs().mean() < limit


def test_experts_in_fp32_are_those_that_training_chooses() -> None:
    trained = model(torch.float32)
    tokens = torch.randint(0, trained.cfg.vocab_size, (300,), generator=torch.Generator().manual_seed(2)).cuda()
    packed = Context.packed([0, 300], "cuda")
    packed.routings = []
    trained(tokens, context=packed)
    engine = Engine(trained, None, EngineConfig(max_model_len=512, num_pages=16, cudagraph_capture_sizes=()))
    seen: list[Tensor] = []
    for experts in (module for module in trained.modules() if isinstance(module, Experts)):
        experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    engine.add(tokens.tolist(), SamplingParams(max_tokens=1, temperature=0))
    while engine.has_unfinished:
        engine.step()
    assert len(seen) == len(packed.routings)
    assert all(torch.equal(chosen, routing.experts_TA) for chosen, routing in zip(seen, packed.routings, strict=True))
