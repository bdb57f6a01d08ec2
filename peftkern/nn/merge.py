"""`merge_and_unload`: the trained update goes into the weights, and the model is a plain one again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from peftkern.nn.config import LoRAConfig
from peftkern.nn.inject import owners_of, replace_module, untie_embeddings
from peftkern.nn.lora import LoRALinear, dense_linear
from peftkern.nn.nf4 import NF4Linear, is_bitsandbytes_4bit


def merge_and_unload(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Adds every low-rank update to its weight and removes peftkern's modules, layer by layer, in place.

    Each merged weight is computed in float64 and rounded once. A dense base keeps its dtype. An NF4 base, adapted or
    not, becomes dense and stays so: quantizing again would change what was trained. Modules trained in full
    (modules_to_save) and biases are in the model already. The parameters stay frozen.

    Args:
        model: one that `apply` adapted with LoRA or QLoRA.
        dtype: of weights that were in NF4; None is their dtype from before quantization.

    Returns:
        The same model: nn.Linear and Conv1D again, `save_pretrained` writes an ordinary checkpoint.

    Raises:
        ValueError: a method that cannot be merged, nothing to merge, or a dtype that is not a dense base's own.
    """
    config = getattr(model, "peftkern_config", None)
    if config is not None and not isinstance(config, LoRAConfig):
        raise ValueError(
            f"merge_and_unload: {config.method!r} changes activations, not weights, and cannot be merged; save the "
            "adapter with save_adapter and load it where it is used"
        )
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (LoRALinear, NF4Linear)) or (config is not None and is_bitsandbytes_4bit(module))
    ]
    names = [name for name in names if not isinstance(_parent(model, name), LoRALinear)]
    if not names or "" in names:
        raise ValueError("merge_and_unload: the model holds no LoRALinear or NF4Linear layer; apply a LoRAConfig first")
    if dtype is not None:
        _check_dtype(model, names, dtype)
    owners = owners_of(model, names)
    embedding = getattr(_input_embeddings(model), "weight", None)
    for name, places in owners.items():
        old = model.get_submodule(name)
        if isinstance(old, LoRALinear) and old.weight is embedding:
            untie_embeddings(model)  # the head goes its own way now, the embedding keeps its weight
        replace_module(places, _merged(old, dtype).train(old.training))
        del old
    _forget(model)
    return model


@torch.no_grad()
def _merged(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A plain dense layer that computes what `layer` computes."""
    if isinstance(layer, LoRALinear):
        layer.unmerge()
        base = layer.base_layer
        if isinstance(base, NF4Linear):
            return dense_linear(layer.merged_weight(dtype), base.bias, base.fan_in_fan_out)
        weight = layer.merged_weight()
        base.weight = nn.Parameter(weight.T.contiguous() if layer.fan_in_fan_out else weight, requires_grad=False)
        return base
    nf4 = layer if isinstance(layer, NF4Linear) else NF4Linear.from_bitsandbytes(layer)
    return dense_linear(nf4.dequantize(dtype), nf4.bias, nf4.fan_in_fan_out)


def _check_dtype(model: nn.Module, names: list[str], dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"merge_and_unload: dtype must be a float dtype, got {dtype}")
    for name in names:
        layer = model.get_submodule(name)
        dense = isinstance(layer, LoRALinear) and not layer.merged and isinstance(layer.weight, torch.Tensor)
        if dense and layer.weight.dtype != dtype:
            raise ValueError(
                f"merge_and_unload: dtype is for NF4 weights, but {name} is dense in {layer.weight.dtype}; leave dtype "
                "out and call model.to(dtype) afterwards"
            )


def _forget(model: Any) -> None:
    """Removes what `apply`, and bitsandbytes' loader before it, left on the model."""
    if hasattr(model, "peftkern_config"):
        del model.peftkern_config
    kept = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if _exists(model, name)]
    if kept:
        model._ddp_params_and_buffers_to_ignore = kept
    elif hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        del model._ddp_params_and_buffers_to_ignore
    if getattr(model, "is_loaded_in_4bit", False):
        model.is_loaded_in_4bit = model.is_quantized = False
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def _exists(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return attribute in module._parameters or attribute in module._buffers


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _input_embeddings(model: nn.Module) -> Any:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
