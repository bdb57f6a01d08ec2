"""Modules for parameter-efficient fine-tuning, and `apply`, which puts them into a model."""

from peftkern.nn.config import (
    AdapterConfig,
    LoRAConfig,
    MethodConfig,
    PromptTuningConfig,
    PTuningV2Config,
    QLoRAConfig,
)

__all__ = [
    "AdapterConfig",
    "LoRAConfig",
    "MethodConfig",
    "PTuningV2Config",
    "PromptTuningConfig",
    "QLoRAConfig",
]
