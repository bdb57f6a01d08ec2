"""Modules for parameter-efficient fine-tuning, and `apply`, which puts them into a model."""

from peftkern.nn.adapter import Adapter
from peftkern.nn.config import (
    AdapterConfig,
    LoRAConfig,
    MethodConfig,
    PromptTuningConfig,
    PTuningV2Config,
    QLoRAConfig,
)
from peftkern.nn.inject import apply, print_trainable_parameters, trainable_parameters
from peftkern.nn.lora import LoRALinear
from peftkern.nn.merge import merge_and_unload
from peftkern.nn.nf4 import NF4Linear
from peftkern.nn.prompt import PromptTuning
from peftkern.nn.ptuning import PTuningV2
from peftkern.nn.qlora import QLoRALinear

__all__ = [
    "Adapter",
    "AdapterConfig",
    "LoRAConfig",
    "LoRALinear",
    "MethodConfig",
    "NF4Linear",
    "PTuningV2",
    "PTuningV2Config",
    "PromptTuning",
    "PromptTuningConfig",
    "QLoRAConfig",
    "QLoRALinear",
    "apply",
    "merge_and_unload",
    "print_trainable_parameters",
    "trainable_parameters",
]
