"""The architecture: one model for training and serving; no files, no optimizer, no runtime limits.

Reading order: `transformer` (the residual blocks), `mla` (section 2.1 of DeepSeek-V2), `gqa` (what MLA is compared
with), `moe` and `balance` (section 2.2), `rope` (section 3.1.4), `context` (what a forward step is told besides the
weights), `attention` and `layers` (the arithmetic that they share).

Dimension letters, used as suffixes of local tensors and as einsum letters:
T packed tokens, S cached tokens, D hidden, H heads, N nope width, R rope width, K = N + R, V value width, C KV latent,
Q query latent, E routed experts, A experts a token, G device groups, M = T*A rows, F expert width, W vocabulary,
X cached elements of a token in one layer.
"""

from dsv2.model.context import Cache, Context
from dsv2.model.transformer import Transformer

__all__ = ["Cache", "Context", "Transformer"]
