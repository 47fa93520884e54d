"""`ModelConfig`: every number that the architecture is made of, and nothing else.

DeepSeek-V2 sections 2.1 (MLA), 2.2 (DeepSeekMoE) and 3.1.4 (YaRN). Standard library only. Limits such as
context length or batch size are not here: no runtime limit may change a number that the model computes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from dsv2.config import schema
from dsv2.config.schema import require

MODEL_TYPES = ("deepseek_v2", "deepseek", "llama", "qwen2", "mixtral")
ROUTERS = ("greedy", "group_limited_greedy")


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's length factor m(a) = 0.1 a ln s + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Long-context extension of the rotary frequencies (DeepSeek-V2 section 3.1.4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """Overrides the rotary ratio that follows from `mscale` and `mscale_all_dim`."""

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"rope.yarn.factor={self.factor} must be at least 1")
        length = self.original_max_position_embeddings
        require(length > 0, f"rope.yarn.original_max_position_embeddings={length} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `interleaved` rotates channels (0,1), (2,3), ...; `half` rotates (0, R/2), (1, R/2+1), ..."""

    theta: float = 10000.0
    layout: Literal["interleaved", "half"] = "interleaved"
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        require(self.theta > 1, f"rope.theta={self.theta} must be above 1")

    # NOTE: the next two look alike and are not. The ratio scales cos and sin, so only the rotary channels;
    # the softmax factor scales the whole logit, the channels without position included. Merging them is a
    # well-known way to a model that works up to 4K tokens and decays beyond.

    @property
    def rotary_ratio(self) -> float:
        """Factor on cos and sin: m(mscale) / m(mscale_all_dim), which is 1 for every DeepSeek-V2 release."""
        yarn = self.yarn
        if yarn is None:
            return 1.0
        if yarn.attention_factor is not None:
            return yarn.attention_factor
        if yarn.mscale and yarn.mscale_all_dim:
            return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        return yarn_mscale(yarn.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """Factor on MLA's softmax scale: m(mscale_all_dim)^2, for short inputs too."""
        yarn = self.yarn
        if yarn is None or not yarn.mscale_all_dim:
            return 1.0
        return yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Multi-head Latent Attention (section 2.1). `q_lora_rank=None`: queries are not compressed (V2-Lite)."""

    kind: Literal["mla"] = "mla"
    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """K = N + R: width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention; MHA has as many KV heads as heads, MQA has one."""

    kind: Literal["gqa"] = "gqa"
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False

    @property
    def rotary_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE (section 2.2) and the routers it is compared with.

    GShard and Mixtral are `greedy` with two experts a token and `norm_topk_prob`; Switch is `greedy` with one.
    """

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    num_shared_experts: int = 0
    first_dense_layers: int = 0
    router: Literal["greedy", "group_limited_greedy"] = "greedy"
    num_groups: int = 1
    groups_per_token: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        E, A, G = self.num_experts, self.experts_per_token, self.num_groups
        require(self.router in ROUTERS, f"moe.router={self.router!r} must be one of {', '.join(ROUTERS)}")
        require(E > 0, f"moe.num_experts={E} must be positive")
        require(0 < A <= E, f"moe.experts_per_token={A} must be between 1 and num_experts={E}")
        require(self.expert_intermediate_size > 0, "moe.expert_intermediate_size must be positive")
        require(self.num_shared_experts >= 0, "moe.num_shared_experts must not be negative")
        require(self.first_dense_layers >= 0, "moe.first_dense_layers must not be negative")
        if self.router == "group_limited_greedy":
            require(G > 0 and E % G == 0, f"moe.num_experts={E} must be divisible by num_groups={G}")
            M = self.groups_per_token
            require(0 < M <= G, f"moe.groups_per_token={M} must be between 1 and num_groups={G}")
            require(
                A <= M * (E // G),
                f"moe.experts_per_token={A} exceeds the {M * (E // G)} experts of groups_per_token={M} groups",
            )

    @property
    def shared_intermediate_size(self) -> int:
        """The shared experts are stored and computed as one SwiGLU of this width."""
        return self.num_shared_experts * self.expert_intermediate_size

    @property
    def device_limit(self) -> tuple[int, int]:
        """Groups of experts, one a device, and how many of them a token may reach (section 2.2.2); else one of one."""
        return (self.num_groups, self.groups_per_token) if self.router == "group_limited_greedy" else (1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the DeepSeek-V2 family, or one that the paper compares it with.

    `model_type` names the Hugging Face layout that checkpoints are read and written in. `max_position_embeddings`
    is what the file advertises; nothing is computed from it. `initializer_std` is used for new models only.
    """

    model_type: Literal["deepseek_v2", "deepseek", "llama", "qwen2", "mixtral"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    """Width of the dense SwiGLU (of the first dense layers where there are experts)."""
    attention: MLAConfig | GQAConfig
    moe: MoEConfig | None = None
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    initializer_std: float = 0.006
    max_position_embeddings: int = 4096
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(
            self.model_type in MODEL_TYPES,
            f"model_type={self.model_type!r} must be one of {', '.join(MODEL_TYPES)}",
        )
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for f in dataclasses.fields(self.attention):
            value = getattr(self.attention, f.name)
            if type(value) is int:
                require(value > 0, f"attention.{f.name}={value} must be positive")
        rotary = self.attention.rotary_dim
        require(rotary % 2 == 0, f"the rotary width {rotary} must be even")
        if isinstance(self.attention, GQAConfig):
            H, kv = self.num_heads, self.attention.num_kv_heads
            require(H % kv == 0, f"num_heads={H} must be divisible by attention.num_kv_heads={kv}")
        self._check_layout()

    def _check_layout(self) -> None:
        """What each Hugging Face layout can express."""
        kind = self.attention.kind
        wants_mla = self.model_type == "deepseek_v2"
        require(
            (kind == "mla") == wants_mla,
            f"model_type={self.model_type!r} cannot hold attention.kind={kind!r}",
        )
        layout = "interleaved" if wants_mla else "half"
        require(
            self.rope.layout == layout,
            f"rope.layout={self.rope.layout!r} must be {layout!r} with model_type={self.model_type!r}",
        )
        if self.model_type in ("llama", "qwen2"):
            require(self.moe is None, f"model_type={self.model_type!r} has no experts: moe must be left out")
        moe = self.moe
        if self.model_type == "mixtral":
            require(
                moe is not None
                and moe.num_shared_experts == 0
                and moe.first_dense_layers == 0
                and moe.norm_topk_prob
                and moe.router == "greedy"
                and moe.experts_per_token > 1
                and moe.expert_intermediate_size == self.intermediate_size,
                "model_type='mixtral' needs a greedy router with norm_topk_prob and at least two experts a token, "
                "experts as wide as intermediate_size, and neither shared experts nor first dense layers",
            )
        if self.model_type == "deepseek" and moe is not None:
            require(
                moe.router == "greedy" and moe.routed_scaling_factor == 1,
                f"model_type='deepseek' cannot hold moe.router={moe.router!r} with "
                f"routed_scaling_factor={moe.routed_scaling_factor}, only 'greedy' with 1",
            )
        if isinstance(self.attention, GQAConfig):
            require(
                self.attention.qkv_bias == (self.model_type == "qwen2"),
                f"attention.qkv_bias={self.attention.qkv_bias} does not fit model_type={self.model_type!r}",
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with fields replaced, validated again."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """One of the published architectures or small ones: see `dsv2.config.presets.PRESETS`."""
        from dsv2.config.presets import preset

        return preset(name)

    @staticmethod
    def from_hf(source: Any) -> ModelConfig:
        """From a Hugging Face `config.json`: a dictionary, the file, or a directory that holds it."""
        from dsv2.config.hf import from_hf

        return from_hf(source)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` dictionary of this model."""
        from dsv2.config.hf import to_hf

        return to_hf(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ModelConfig:
        """From our own nested form (recipes); unknown keys are errors that suggest the nearest key."""
        return schema.from_dict(ModelConfig, data, "model")

    def to_dict(self) -> dict[str, Any]:
        return schema.to_dict(self)
