"""adapter_config.json as PEFT writes it, to and from our configs. What we cannot honour is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.nn as nn

from peftkern.nn.config import (
    AdapterConfig,
    LoRAConfig,
    MethodConfig,
    PromptTuningConfig,
    PTuningV2Config,
    QLoRAConfig,
)
from peftkern.nn.inject import LayerPlan
from peftkern.nn.lora import LoRALinear
from peftkern.nn.targets import (
    ALL_LINEAR,
    PRESETS,
    linear_kinds,
    match_modules,
    match_pattern,
    matches_suffix,
    output_head_names,
)

PEFT_FORMAT = "0.21.2"  # the PEFT release whose files these are
OWN_ADAPTER = "PEFTKERN_ADAPTER"  # bottleneck adapters, for which PEFT has no format
PREFIX = "base_model.model."

# What a LoRA file may say without changing what is computed, and what is honoured.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "lora_ga_config", "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
_HONOURED = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# Initializations that leave the base weight alone. The others move a part of it into the adapter, so the adapter is
# wrong on an ordinary base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(directory: Path) -> dict[str, Any]:
    """The JSON object in adapter_config.json.

    Raises:
        ValueError: in one line with its cure: not an adapter directory, several adapters, or not JSON.
    """
    path = directory / "adapter_config.json"
    if not directory.is_dir():
        raise ValueError(f"load_adapter: {directory} is not a directory; give the one that holds adapter_config.json")
    if not path.is_file():
        inner = sorted(child.parent.name for child in directory.glob("*/adapter_config.json"))
        if inner:
            raise ValueError(
                f"load_adapter: {directory} holds several adapters ({', '.join(inner)}); give the directory of one"
            )
        raise ValueError(f"load_adapter: {directory} holds no adapter_config.json; is it an adapter's directory?")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"load_adapter: {path} cannot be read: {error.strerror}; check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_adapter: {path} is not JSON ({error}); copy or save it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"load_adapter: {path} must hold a JSON object, got {type(values).__name__}")
    return values


def to_peft(model: nn.Module, config: MethodConfig, base_model: str | None) -> dict[str, Any]:
    """The JSON object for adapter_config.json that makes stock PEFT compute what `model` computes.

    Raises:
        TypeError: a config without a file format.
    """
    shared: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model or getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "peft_version": PEFT_FORMAT,
        "revision": None,
    }
    if isinstance(config, LoRAConfig):
        return {**shared, **_lora_to_peft(model, config)}
    if isinstance(config, AdapterConfig):
        return {**shared, **config.to_dict(), "peft_type": OWN_ADAPTER, "task_type": _task_type(model, config)}
    if isinstance(config, (PromptTuningConfig, PTuningV2Config)):
        return {**shared, **_prompt_to_peft(model, config)}
    raise TypeError(f"save_adapter: {type(config).__name__} has no file format")


def from_peft(
    values: dict[str, Any], own: dict[str, Any], model: nn.Module, adapted: list[str], quantize: bool
) -> MethodConfig:
    """Our config for an adapter file.

    Args:
        values: adapter_config.json.
        own: the `to_dict()` of the config that saved it with peftkern, {} where PEFT did.
        model: the base model, not yet adapted.
        adapted: names of the layers that have LoRA tensors in the file.
        quantize: whether an adapter trained with QLoRA quantizes the base again.

    Raises:
        ValueError: a method or a feature that is not supported here, by name, or values that make no sense.
    """
    kind = values.get("peft_type")
    if kind == "LORA":
        fields = _lora_from_peft(values, model, adapted)
        if own.get("method") != "qlora" or not quantize:
            return LoRAConfig.from_dict(fields)
        storage: dict[str, Any] = {n: own[n] for n in ("blocksize", "double_quant", "compute_dtype") if n in own}
        return QLoRAConfig.from_dict({**fields, **storage})
    if kind == OWN_ADAPTER:
        ours = {"method", *AdapterConfig.__dataclass_fields__}
        return AdapterConfig.from_dict({name: value for name, value in values.items() if name in ours})
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        if (values.get("num_transformer_submodules") or 1) != 1 or values.get("modules_to_save"):
            raise ValueError(f"load_adapter: {kind} with several submodules or modules_to_save is not supported here")
        if kind == "PROMPT_TUNING":
            return PromptTuningConfig.from_dict({"num_tokens": values.get("num_virtual_tokens"), "init": "random"})
        if own.get("method") == PTuningV2Config.method:
            return PTuningV2Config.from_dict({**own, "num_tokens": values.get("num_virtual_tokens")})
        return PTuningV2Config.from_dict({"num_tokens": values.get("num_virtual_tokens")})
    supported = f"LORA, PROMPT_TUNING, PREFIX_TUNING and {OWN_ADAPTER}"
    raise ValueError(f"load_adapter: peft_type is {kind!r}, supported are {supported}; load it with PEFT itself")


def layer_plans(values: dict[str, Any], names: Iterable[str]) -> dict[str, LayerPlan]:
    """Rank and lora_alpha of each layer as adapter_config.json has them."""
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    return {
        name: LayerPlan(
            ranks.get(match_pattern(ranks, name) or "", values["r"]),
            alphas.get(match_pattern(alphas, name) or "", values["lora_alpha"]),
        )
        for name in names
    }


def _lora_to_peft(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    target, exclude = _peft_targets(model, config, list(layers))
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, config),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": target,
        "exclude_modules": exclude,
        "bias": config.bias,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _peft_targets(model: nn.Module, config: LoRAConfig, adapted: list[str]) -> tuple[Any, Any]:
    """target_modules and exclude_modules that select, by PEFT's rules on the base model, exactly the adapted layers."""
    inside = tuple(f"{name}." for name in adapted)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    written, exclude = config.target_modules, config.exclude_modules
    candidates: list[tuple[Any, Any]] = [
        (sorted({name.rsplit(".", 1)[-1] for name in adapted}), None),
        (sorted(adapted), None),
    ]
    if not isinstance(written, str) or written not in (*PRESETS, ALL_LINEAR):
        candidates.insert(0, (written, exclude))
    for target, left_out in candidates:
        values = {
            "target_modules": target,
            "exclude_modules": left_out,
            "modules_to_save": config.modules_to_save,
        }
        if [name for name in names if _selected(values, name)] == adapted:
            return target, left_out
    return sorted(adapted), None


def _selected(values: dict[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module `name` under these settings."""
    exclude, target = values.get("exclude_modules"), values["target_modules"]
    if exclude and (re.fullmatch(exclude, name) if isinstance(exclude, str) else matches_suffix(name, exclude)):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in values.get("modules_to_save") or ()):
        return False
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    if name in target:
        return True
    return matches_suffix(name, target) and _layer_selected(values, name)


def _layer_selected(values: dict[str, Any], name: str) -> bool:
    layers, pattern = values.get("layers_to_transform"), values.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if patterns:
        found = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name))), None)
    else:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _lora_from_peft(values: dict[str, Any], model: nn.Module, adapted: list[str]) -> dict[str, Any]:
    refuse_unsupported(values)
    names = [name for name, module in model.named_modules() if isinstance(module, linear_kinds())]
    selected = _select(values, model, names)
    if selected and set(selected) != set(adapted):
        missing, extra = sorted(set(selected) - set(adapted)), sorted(set(adapted) - set(selected))
        raise ValueError(
            "load_adapter: the layers that adapter_config.json targets and those with tensors in the file differ"
            + (f"; without tensors: {_some(missing)}" if missing else "")
            + (f"; not targeted, or not in this model: {_some(extra)}" if extra else "")
            + "; is this the adapter's base model?"
        )
    modules = [name for name, _ in model.named_modules()]
    saved = [e for e in values.get("modules_to_save") or () if any(matches_suffix(name, (e,)) for name in modules)]
    target, exclude = values.get("target_modules"), values.get("exclude_modules")
    if not _same_selection(model, target, exclude, saved, selected or adapted):
        target, exclude = selected or adapted, None
    return {
        "r": values["r"],
        "lora_alpha": values["lora_alpha"],
        "lora_dropout": values.get("lora_dropout", 0.0),
        "target_modules": target,
        "exclude_modules": exclude,
        "bias": values.get("bias", "none"),
        "modules_to_save": saved or None,
        "use_rslora": values.get("use_rslora", False),
        # PEFT lets a key fit nothing; apply does not.
        "rank_pattern": _fitting(values.get("rank_pattern"), selected or adapted),
        "alpha_pattern": _fitting(values.get("alpha_pattern"), selected or adapted),
    }


def refuse_unsupported(values: dict[str, Any]) -> None:
    """Raises ValueError naming the first setting of a LoRA file that is missing, or not supported and not harmless."""
    for name in ("r", "lora_alpha"):
        if name not in values:
            raise ValueError(f"load_adapter: adapter_config.json lacks {name!r}, which changes the result; add it")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"load_adapter: init_lora_weights={init!r} moved a part of the base weights into the adapter, which is not "
            "supported here; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for name, value in values.items():
        if name not in _HARMLESS | _HONOURED and value:
            raise ValueError(
                f"load_adapter: the adapter uses {name}={value!r}, which is not supported here and would be silently "
                "wrong without; load it with PEFT itself"
            )


def _select(values: dict[str, Any], model: nn.Module, names: list[str]) -> list[str]:
    target = values.get("target_modules")
    if target is None:
        return []
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        heads = output_head_names(model)
        return [name for name in names if name not in heads and _selected({**values, "target_modules": [name]}, name)]
    try:
        return [name for name in names if _selected(values, name)]
    except (TypeError, re.error) as error:
        raise ValueError(f"load_adapter: adapter_config.json has target_modules {target!r}: {error}") from None


def _same_selection(model: nn.Module, target: Any, exclude: Any, saved: list[str], wanted: list[str]) -> bool:
    """Whether `apply` selects the wanted layers for these settings, so that they can stay as they are written."""
    if not target:
        return False
    try:
        chosen = match_modules(model, target, exclude, linear_kinds())
    except (ValueError, TypeError):
        return False
    inside = tuple(f"{name}." for name in saved)
    return [n for n in chosen if n not in saved and not (inside and n.startswith(inside))] == wanted


def _fitting(patterns: dict[str, Any] | None, names: list[str]) -> dict[str, Any]:
    return {key: v for key, v in (patterns or {}).items() if any(match_pattern([key], name) for name in names)}


def _prompt_to_peft(model: nn.Module, config: PromptTuningConfig | PTuningV2Config) -> dict[str, Any]:
    text: Any = getattr(model, "config", None)
    text = text.get_text_config() if hasattr(text, "get_text_config") else text
    heads, layers = getattr(text, "num_attention_heads", None), getattr(text, "num_hidden_layers", None)
    values: dict[str, Any] = {
        "task_type": "CAUSAL_LM",  # without it PEFT loads the prompt and never uses it
        "num_virtual_tokens": config.num_tokens,
        "num_transformer_submodules": 1,
        "num_layers": layers,
        "modules_to_save": None,
    }
    if isinstance(config, PromptTuningConfig):
        width = model.prompt_tuning.peftkern_state()["prompt_embeddings"].shape[1]  # type: ignore[union-attr, operator]
        return {
            **values,
            "peft_type": "PROMPT_TUNING",
            "token_dim": width,
            "num_attention_heads": heads,
            "prompt_tuning_init": "RANDOM",  # what it started from; loading replaces it and needs no tokenizer then
        }
    width = model.ptuning_v2.peftkern_state()["prompt_embeddings"].shape[1]  # type: ignore[union-attr, operator]
    dim = width // (2 * layers) if layers else None  # key and value of every layer side by side
    return {
        **values,
        "peft_type": "PREFIX_TUNING",
        "token_dim": dim,
        "num_attention_heads": getattr(text, "num_key_value_heads", None) or heads,
        "encoder_hidden_size": dim,
        "prefix_projection": False,  # the file holds the computed prefix
    }


def _task_type(model: nn.Module, config: MethodConfig) -> str | None:
    """PEFT's task type, only where PEFT then expects nothing that the file does not hold."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    saved = getattr(config, "modules_to_save", None) or ()
    for end, task in (("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS")):
        if name.endswith(end) and {"score", "classifier"} & set(saved):
            return task
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
