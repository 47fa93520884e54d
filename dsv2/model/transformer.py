"""The decoder: embedding, pre-norm residual blocks, final norm, output projection.

Module names are the checkpoint's, with the routed experts of a layer packed. No loss, no sampling, no limits here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2.config import MLAConfig, ModelConfig
from dsv2.model.context import Context
from dsv2.model.gqa import GQA
from dsv2.model.layers import RMSNorm, SwiGLU
from dsv2.model.mla import MLA
from dsv2.model.moe import MoE
from dsv2.model.rope import rotary_tables


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the FFN is dense or a mixture of experts.

    Each sum is taken together with the norm that follows it, so a block takes and returns it as x and delta.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.self_attn = MLA(cfg, layer) if isinstance(cfg.attention, MLAConfig) else GQA(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        if cfg.moe is not None and cfg.is_moe_layer(layer):
            self.mlp = MoE(cfg, cfg.moe)
        else:
            self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self, x_TD: Tensor, delta_TD: Tensor | None, tables: tuple[Tensor, Tensor], context: Context
    ) -> tuple[Tensor, Tensor]:
        h_TD, x_TD = self.input_layernorm.of_sum(x_TD, delta_TD)
        h_TD, x_TD = self.post_attention_layernorm.of_sum(x_TD, self.self_attn(h_TD, tables, context))
        return x_TD, self.mlp(h_TD, context) if isinstance(self.mlp, MoE) else self.mlp(h_TD)


class Decoder(nn.Module):
    """Everything below the output projection: token ids [T] to normalised hidden states [T, D]."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.rope, self.rotary_dim = cfg.rope, cfg.attention.rotary_dim
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        tables = rotary_tables(self.rope, self.rotary_dim, context.positions_T)
        x_TD, delta_TD = self.embed_tokens(tokens_T), None
        for layer in self.layers:
            x_TD, delta_TD = layer(x_TD, delta_TD, tables, context)
        return self.norm.of_sum(x_TD, delta_TD)[0]


class Transformer(nn.Module):
    """A causal language model of the DeepSeek-V2 family, described by `cfg`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(
        self,
        tokens_T: Tensor,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Logits of the next token, [T, W] in the model's dtype.

        Args:
            tokens_T: token ids [T] int64, documents side by side.
            cu_seqlens: document bounds [num_documents + 1], from 0 to T; None: one document.
            context: instead of `cu_seqlens`, for a step over a cache or to collect routings.

        Raises ValueError for ids outside the vocabulary (checked where the ids are on the CPU, and so free to read),
        for bounds that do not match T, and for `cu_seqlens` and `context` together.
        """
        if context is None:
            bounds = [0, len(tokens_T)] if cu_seqlens is None else [int(b) for b in cu_seqlens]
            context = Context.packed(bounds, tokens_T.device)
        elif cu_seqlens is not None:
            raise ValueError("give cu_seqlens or context, not both")
        self._check(tokens_T, context)
        return self.logits(self.model(tokens_T, context))

    @property
    def head_weight(self) -> Tensor:
        """Output projection [W, D]."""
        return (self.model.embed_tokens if self.cfg.tie_embeddings else self.lm_head).weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Output projection of normalised hidden states, [T, W]."""
        return F.linear(hidden_TD, self.head_weight)

    def join_projections(self) -> None:
        """Lay matrices that multiply the same input side by side, so that inference reads them in one product.

        The parameters stay the ones they are, with their values, names and shapes; only their memory moves.
        """
        for module in self.modules():
            if isinstance(module, (MLA, SwiGLU)):
                module.join()

    def _check(self, tokens_T: Tensor, context: Context) -> None:
        if tokens_T.dim() != 1:
            raise ValueError(f"tokens must be packed [T], got shape {tuple(tokens_T.shape)}")
        if tokens_T.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 ids, got {tokens_T.dtype}")
        if len(context.positions_T) != len(tokens_T):
            raise ValueError(f"the context describes {len(context.positions_T)} tokens, got {len(tokens_T)}")
        if tokens_T.device.type == "cpu" and len(tokens_T):
            low, high = int(tokens_T.min()), int(tokens_T.max())
            if low < 0 or high >= self.cfg.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self.cfg.vocab_size}"
                )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Every matrix from a normal of `initializer_std`, gains 1, biases 0 (section 3.1.2)."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith(".bias"):
                p.zero_()
            else:
                p.normal_(0.0, self.cfg.initializer_std, generator=generator)
