"""DeepSeek-V2 as working software: Multi-head Latent Attention and DeepSeekMoE, trained, served and evaluated.

Names are imported when first used: `import dsv2` loads neither torch nor a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv2.config import ModelConfig
    from dsv2.engine.generate import Sampling, generate
    from dsv2.engine.llm import LLM
    from dsv2.engine.sampling import SamplingParams
    from dsv2.model import Transformer
    from dsv2.text import Tokenizer
    from dsv2.weights import load, save

__version__ = "0.1.0"

_HOME = {
    "LLM": "dsv2.engine.llm",
    "ModelConfig": "dsv2.config",
    "Sampling": "dsv2.engine.generate",
    "SamplingParams": "dsv2.engine.sampling",
    "Tokenizer": "dsv2.text",
    "Transformer": "dsv2.model",
    "generate": "dsv2.engine.generate",
    "load": "dsv2.weights",
    "save": "dsv2.weights",
}

__all__ = ["LLM", "ModelConfig", "Sampling", "SamplingParams", "Tokenizer", "Transformer", "generate", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv2' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
