"""peftkern: fused kernels for parameter-efficient fine-tuning."""

from peftkern import optim
from peftkern.formats.adapter import load_adapter, save_adapter
from peftkern.nn import (
    Adapter,
    AdapterConfig,
    LoRAConfig,
    LoRALinear,
    MethodConfig,
    NF4Linear,
    PromptTuning,
    PromptTuningConfig,
    PTuningV2,
    PTuningV2Config,
    QLoRAConfig,
    QLoRALinear,
    apply,
    merge_and_unload,
    print_trainable_parameters,
    trainable_parameters,
)
from peftkern.ops import (
    NF4Weight,
    adamw8bit_step_,
    backends,
    bottleneck,
    dequantize_nf4,
    lora_matmul,
    nf4_matmul,
    quantize_nf4,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "LoRAConfig",
    "LoRALinear",
    "MethodConfig",
    "NF4Linear",
    "NF4Weight",
    "PTuningV2",
    "PTuningV2Config",
    "PromptTuning",
    "PromptTuningConfig",
    "QLoRAConfig",
    "QLoRALinear",
    "adamw8bit_step_",
    "apply",
    "backends",
    "bottleneck",
    "dequantize_nf4",
    "load_adapter",
    "lora_matmul",
    "merge_and_unload",
    "nf4_matmul",
    "optim",
    "print_trainable_parameters",
    "quantize_nf4",
    "save_adapter",
    "trainable_parameters",
]
