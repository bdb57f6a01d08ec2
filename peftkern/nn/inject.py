"""`apply`: puts a method's trainable parts into a model and freezes the rest."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.nn as nn

from peftkern.nn.config import LoRAConfig, MethodConfig, QLoRAConfig
from peftkern.nn.lora import LoRALinear
from peftkern.nn.nf4 import NF4Linear, dense_weight_of, is_bitsandbytes_4bit
from peftkern.nn.qlora import QLoRALinear, quantized
from peftkern.nn.targets import (
    ALL_LINEAR,
    check_patterns,
    linear_kinds,
    match_modules,
    match_pattern,
    matches_suffix,
    near,
)

_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


class LayerPlan(NamedTuple):
    """The rank and lora_alpha of one adapted layer."""

    rank: int
    lora_alpha: float


def apply(model: nn.Module, config: MethodConfig, tokenizer: Any = None) -> nn.Module:
    """Makes `model` train with the method that `config` describes: adds its parts, freezes everything else.

    The model is changed in place and returned, and stays of its class: `generate`, Trainer, gradient checkpointing and
    `state_dict` go on working. `model.peftkern_config` holds the config from then on. Under QLoRA every linear layer
    but the output head is quantized, one after the other, so that no second copy of the model exists at any time.

    Args:
        model: a Transformers model or any nn.Module, before it is compiled or wrapped for several GPUs.
        config: one of the configs of `peftkern.nn.config`.
        tokenizer: needed by PromptTuningConfig(init="text") only.

    Raises:
        TypeError: not a module or not a config, or a target layer of another library's making.
        ValueError: targets that match nothing, or a model that is adapted already. The model is then as it was, except
            that an error while quantizing leaves the layers before it in NF4.
    """
    _check(model, config)
    # Names and not the parameters: a reference here would keep every dense weight alive while QLoRA quantizes.
    trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        _dispatch(model, config, tokenizer)
    except BaseException:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained_before)
        raise
    model.peftkern_config = config  # type: ignore[assignment]
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are; a weight in 4 bits counts with its unpacked elements."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":  # bitsandbytes: two elements a byte
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    total += sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints `trainable params: 1,000 || all params: 2,000 || trainable%: 50.0000`, PEFT's line."""
    trainable, total = trainable_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def lora_plan(model: nn.Module, config: LoRAConfig) -> dict[str, LayerPlan]:
    """Which layers a config adapts, in the model's order, and with which rank and lora_alpha. Changes nothing.

    Raises:
        ValueError: targets or pattern keys that match nothing.
        TypeError: a target whose weight is packed by another library.
    """
    names = match_modules(model, config.target_modules, config.exclude_modules, linear_kinds())
    saved = saved_module_names(model, config.modules_to_save)
    names = [name for name in names if not _is_inside(name, saved)]
    if not names:
        raise ValueError(f"modules_to_save: {config.modules_to_save} contains every target module; shorten it")
    check_patterns("rank_pattern", config.rank_pattern, names)
    check_patterns("alpha_pattern", config.alpha_pattern, names)
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, NF4Linear) and not is_bitsandbytes_4bit(module):
            dense_weight_of(module, f"target {name}")
    return {
        name: LayerPlan(
            config.rank_pattern.get(match_pattern(config.rank_pattern, name) or "", config.r),
            config.alpha_pattern.get(match_pattern(config.alpha_pattern, name) or "", config.lora_alpha),
        )
        for name in names
    }


def saved_module_names(model: nn.Module, modules_to_save: list[str] | None) -> list[str]:
    """The full names that `modules_to_save` selects by suffix, outermost only.

    Raises:
        ValueError: an entry that matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    for entry in modules_to_save or ():
        if not any(matches_suffix(name, (entry,)) for name in names):
            raise ValueError(f"modules_to_save: {entry!r} matches no module{near(entry, names)}")
    chosen: list[str] = []
    for name in names:
        if matches_suffix(name, modules_to_save or ()) and not _is_inside(name, chosen):
            chosen.append(name)
    return chosen


def replace_module(owners: Iterable[tuple[nn.Module, str]], new: nn.Module) -> None:
    """Puts `new` under every (parent, attribute) of the module it replaces, which may be shared between parents."""
    for parent, attribute in owners:
        setattr(parent, attribute, new)


def owners_of(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each module name, every (parent, attribute) under which that module is registered."""
    by_id: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                by_id[id(child)].append((parent, attribute))
    return {name: by_id[id(model.get_submodule(name))] for name in names}


def _check(model: nn.Module, config: MethodConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, MethodConfig) or not config.method:
        raise TypeError(f"apply: config must be a LoRAConfig or another method's config, got {type(config).__name__}")
    if type(model).__name__ in _WRAPPERS:
        raise TypeError(f"apply: model is a {type(model).__name__}; apply first, then compile or wrap the model")
    present = getattr(model, "peftkern_config", None)
    if isinstance(present, MethodConfig):
        raise ValueError(
            f"apply: model has {present.method!r} already; merge_and_unload it, or load the base model anew"
        )
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) or any(c.__name__ == "BaseTunerLayer" for c in type(module).__mro__):
            raise ValueError(f"apply: {name} is already adapted ({type(module).__name__}); start from the base model")


def _dispatch(model: nn.Module, config: MethodConfig, tokenizer: Any) -> None:
    if isinstance(config, LoRAConfig):
        _apply_lora(model, config)
        _train_biases(model, config.bias)
    elif config.method == "adapter":
        from peftkern.nn.adapter import apply_adapter

        saved = saved_module_names(model, config.modules_to_save)  # type: ignore[attr-defined]
        model.requires_grad_(False)
        apply_adapter(model, config)
        _train_saved(model, saved)
    elif config.method == "prompt":
        from peftkern.nn.prompt import apply_prompt_tuning

        model.requires_grad_(False)
        apply_prompt_tuning(model, config, tokenizer=tokenizer)
    else:
        from peftkern.nn.ptuning import apply_ptuning_v2

        model.requires_grad_(False)
        apply_ptuning_v2(model, config)


def _apply_lora(model: nn.Module, config: LoRAConfig) -> None:
    plan = lora_plan(model, config)
    saved = saved_module_names(model, config.modules_to_save)
    to_quantize: list[str] = []
    if isinstance(config, QLoRAConfig):
        to_quantize = _quantizable(model, saved)
    owners = owners_of(model, dict.fromkeys([*plan, *to_quantize]))
    quantize = set(to_quantize)
    model.requires_grad_(False)
    for name, places in owners.items():
        old = model.get_submodule(name)
        new: nn.Module = old
        if name in quantize and isinstance(config, QLoRAConfig):
            storage = (config.blocksize, config.double_quant, config.compute_dtype)
            if name in plan:
                rank, alpha = plan[name]
                new = QLoRALinear(old, rank, alpha, config.lora_dropout, *storage, config.use_rslora)  # type: ignore[arg-type]
            else:
                new = quantized(old, *storage)  # type: ignore[arg-type]
        elif name in plan:
            new = LoRALinear(old, *plan[name], config.lora_dropout, config.use_rslora)
        replace_module(places, new.train(old.training))
        del old, new  # the dense weight goes before the next layer is quantized
    _train_saved(model, saved)
    _skip_in_ddp(model)


def _quantizable(model: nn.Module, saved: list[str]) -> list[str]:
    """Every linear layer but the output head and modules_to_save, checked before the first one is quantized."""
    names = match_modules(model, ALL_LINEAR, None, linear_kinds())
    names = [name for name in names if not _is_inside(name, saved)]
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, NF4Linear) and not is_bitsandbytes_4bit(module):
            weight, _ = dense_weight_of(module, f"QLoRA, layer {name}")
            if weight.is_meta:
                raise ValueError(f"apply: {name} is on the meta device and holds no values; load the model first")
    return names


def _train_biases(model: nn.Module, bias: str) -> None:
    if bias == "all":
        for name, parameter in model.named_parameters():
            if name == "bias" or name.endswith(".bias"):
                parameter.requires_grad_(True)
    elif bias == "lora_only":
        for module in model.modules():
            if isinstance(module, LoRALinear) and module.bias is not None:
                module.bias.requires_grad_(True)


def _train_saved(model: nn.Module, names: list[str]) -> None:
    """Replaces modules_to_save by trainable copies, so that what is tied to one (an embedding) stays frozen."""
    owners = owners_of(model, names)
    for name, places in owners.items():
        old = model.get_submodule(name)
        own = {id(parameter) for parameter in old.parameters()}
        replace_module(places, copy.deepcopy(old).requires_grad_(True))
        if any(id(parameter) in own for parameter in model.parameters()):
            untie_embeddings(model)


def untie_embeddings(model: nn.Module) -> None:
    """Tells Transformers that the output head no longer shares the embedding's weight, or it would tie them again."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False  # type: ignore[union-attr]


def _skip_in_ddp(model: nn.Module) -> None:
    """DistributedDataParallel sends every buffer of rank 0 around in each forward; frozen NF4 bytes need none of it."""
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            ignored.extend(f"{name}.{buffer}" for buffer, _ in module.named_buffers())
    if ignored:
        model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def _is_inside(name: str, containers: Iterable[str]) -> bool:
    return any(name == container or name.startswith(f"{container}.") for container in containers)
