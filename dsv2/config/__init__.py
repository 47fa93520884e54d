"""Frozen dataclasses that say what a model and a run are. Standard library only: importing this costs nothing."""

from dsv2.config.engine import EngineConfig
from dsv2.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from dsv2.config.presets import PRESETS

__all__ = [
    "PRESETS",
    "EngineConfig",
    "GQAConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "YarnConfig",
]
