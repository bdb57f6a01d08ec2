"""Adapters on disk as PEFT writes them: adapter_config.json and adapter_model.safetensors, both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from peftkern.formats.atomic import (
    PathLike,
    atomic_group,
    bytes_writer,
    conversion_cure,
    load_safetensors,
    load_safetensors_metadata,
    safetensors_writer,
)
from peftkern.formats.peft_config import (
    OWN_ADAPTER,
    PREFIX,
    from_peft,
    layer_plans,
    read_config,
    refuse_unsupported,
    to_peft,
)
from peftkern.nn.config import AdapterConfig, LoRAConfig, MethodConfig, PromptTuningConfig, PTuningV2Config
from peftkern.nn.inject import apply, lora_plan, saved_module_names
from peftkern.nn.lora import LoRALinear

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_METADATA = "peftkern"  # our config as JSON beside the tensors: what adapter_config.json has no field for
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def save_adapter(model: nn.Module, directory: PathLike, base_model_name_or_path: str | None = None) -> None:
    """Writes what `apply` made trainable, for `load_adapter` and for stock PEFT's `PeftModel.from_pretrained`.

    LoRA and QLoRA are PEFT's LORA, prompt tuning its PROMPT_TUNING, P-tuning v2 its PREFIX_TUNING. Bottleneck adapters,
    for which PEFT has no format, are written in the same two files with a peft_type of their own. Tensors keep their
    dtype.

    Args:
        model: an adapted model, possibly compiled or wrapped by DistributedDataParallel.
        directory: made if it is not there.
        base_model_name_or_path: what the config names as the base; None takes the model's own name.

    Raises:
        ValueError: the model is not adapted.
        OSError: the disk refuses. Both files are then as they were before.
    """
    model = _unwrap(model)
    config = _config_of(model, "save_adapter")
    tensors = adapter_state_dict(model)
    values = to_peft(model, config, base_model_name_or_path)
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot save to {folder}: {error.strerror}; pick a writable directory") from error
    with atomic_group() as add:
        add(folder / TENSORS, safetensors_writer(tensors, {_METADATA: json.dumps(config.to_dict())}))
        add(folder / CONFIG, bytes_writer(json.dumps(values, indent=2, sort_keys=True).encode("utf-8")))


def load_adapter(model: nn.Module, directory: PathLike, *, quantize: bool = True) -> nn.Module:
    """Reads an adapter that `save_adapter` or PEFT wrote, and applies its config first if the model has none yet.

    Everything is checked before a tensor is copied, for LoRA and prompts also before the config is applied. LoRA's
    tensors keep the dtype of the file when the config is applied here; on a model that is adapted already they are cast
    to its parameters'.

    Args:
        model: the base model, or one that is adapted in the same way.
        directory: holds adapter_config.json and adapter_model.safetensors.
        quantize: whether an adapter that was trained with QLoRA quantizes the base's linear layers again, as it was
            trained. False keeps the base as it is.

    Returns:
        The model, adapted.

    Raises:
        ValueError: in one line with its cure: files missing or damaged, a pickle, a feature that is not supported,
            tensors that do not fit the model.
    """
    target = _unwrap(model)
    folder = Path(directory)
    values = read_config(folder)
    tensors = _read_tensors(folder)
    if isinstance(getattr(target, "peftkern_config", None), MethodConfig):
        _check_same_method(target, values)
        set_adapter_state_dict(target, tensors)
        return model
    tensors = _drop_duplicates(tensors)
    adapted = [k.removeprefix(PREFIX).removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    config = from_peft(values, _own_config(folder), target, adapted, quantize)
    if isinstance(config, LoRAConfig):
        _add_saved_embeddings(target, config, tensors)
        _check_tensors(_lora_shapes(target, config), tensors)
    elif isinstance(config, (PromptTuningConfig, PTuningV2Config)):
        _check_prompt(target, config, tensors)
    apply(target, config)
    if isinstance(config, LoRAConfig):
        _adopt_dtypes(target, tensors)
    set_adapter_state_dict(target, tensors)
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names they have on disk, detached and not copied.

    Raises:
        ValueError: the model is not adapted.
    """
    model = _unwrap(model)
    config = _config_of(model, "adapter_state_dict")
    if isinstance(config, PromptTuningConfig):
        return _detached(model.prompt_tuning.peftkern_state())  # type: ignore[union-attr, operator]
    if isinstance(config, PTuningV2Config):
        return _detached(model.ptuning_v2.peftkern_state())  # type: ignore[union-attr, operator]
    saved = getattr(config, "modules_to_save", None)
    if isinstance(config, AdapterConfig):
        from peftkern.nn.adapter import adapter_tensors

        return {**_detached(adapter_tensors(model)), **_detached(_saved_tensors(model, saved))}
    return _detached({**_lora_tensors(model, config), **_saved_tensors(model, saved)})


@torch.no_grad()
def set_adapter_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies tensors named as on disk into an adapted model, cast to its dtypes and devices.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, listed; nothing is copied then.
    """
    model = _unwrap(model)
    config = _config_of(model, "set_adapter_state_dict")
    state = _drop_duplicates(state)
    own = adapter_state_dict(model)
    _check_tensors({key: tuple(tensor.shape) for key, tensor in own.items()}, state)
    if isinstance(config, PromptTuningConfig):
        model.prompt_tuning.load_peftkern_state(dict(state))  # type: ignore[union-attr, operator]
        return
    if isinstance(config, PTuningV2Config):
        model.ptuning_v2.load_peftkern_state(dict(state))  # type: ignore[union-attr, operator]
        return
    if isinstance(config, AdapterConfig):
        from peftkern.nn.adapter import load_adapter_tensors

        saved = _saved_tensors(model, config.modules_to_save)
        load_adapter_tensors(model, {key: tensor for key, tensor in state.items() if key not in saved})
        own = saved
    for key, tensor in own.items():
        tensor.detach().copy_(state[key])


def _lora_tensors(model: nn.Module, config: MethodConfig) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    bias = getattr(config, "bias", "none")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            key = PREFIX + _clean(name)
            tensors[f"{key}.lora_A.weight"] = module.lora_A
            tensors[f"{key}.lora_B.weight"] = module.lora_B
            if bias == "lora_only" and module.bias is not None:
                tensors[f"{key}.base_layer.bias"] = module.bias
    if bias == "all":
        tensors.update({PREFIX + _clean(n): p for n, p in model.named_parameters() if n.endswith(".bias")})
    return tensors


def _saved_tensors(model: nn.Module, modules_to_save: list[str] | None) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{_clean(name)}.{key}": tensor
        for name in saved_module_names(model, modules_to_save)
        for key, tensor in model.get_submodule(name).state_dict().items()
    }


def _lora_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `adapter_state_dict` would give after `apply(model, config)`. Changes nothing."""
    shapes: dict[str, tuple[int, ...]] = {}
    plan = lora_plan(model, config)
    for name, (rank, _) in plan.items():
        module: Any = model.get_submodule(name)
        if hasattr(module, "in_features"):
            columns, rows = module.in_features, module.out_features
        else:  # transformers' Conv1D
            columns, rows = module.weight.shape
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, columns)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (rows, rank)
        if config.bias == "lora_only" and module.bias is not None:
            shapes[f"{PREFIX}{name}.base_layer.bias"] = (rows,)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            path = name.removesuffix(".bias")
            if path != name:
                inner = f"{path}.base_layer.bias" if path in plan else name
                shapes[PREFIX + inner] = tuple(parameter.shape)
    saved = _saved_tensors(model, config.modules_to_save)
    return shapes | {key: tuple(tensor.shape) for key, tensor in saved.items()}


def _check_tensors(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, torch.Tensor]) -> None:
    problems = [f"missing {key}" for key in expected if key not in got]
    problems += [f"unexpected {key}" for key in got if key not in expected]
    for key, tensor in got.items():
        shape, wanted = tuple(tensor.shape), expected.get(key)
        if wanted is None or shape == wanted:
            continue
        axis = 0 if key.endswith("lora_A.weight") else 1
        ranks = len(shape) == 2 and "lora_" in key and shape[1 - axis] == wanted[1 - axis]
        what = f"rank {shape[axis]} instead of {wanted[axis]}" if ranks else f"shape {list(shape)}, not {list(wanted)}"
        problems.append(f"{key} has {what}")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"adapter tensors do not fit the model: {'; '.join(problems[:6])}{more}; is this the adapter's base model, "
            "and its config?"
        )


def _check_prompt(
    model: nn.Module, config: PromptTuningConfig | PTuningV2Config, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Catches a prompt for another model before the model is changed."""
    prompt = tensors.get("prompt_embeddings")
    if prompt is None or prompt.dim() != 2 or prompt.shape[0] != config.num_tokens:
        found = "none" if prompt is None else list(prompt.shape)
        raise ValueError(f"load_adapter: prompt_embeddings must be [{config.num_tokens}, width], got {found}")
    if isinstance(config, PromptTuningConfig):
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        if prompt.shape[1] != width:
            raise ValueError(
                f"load_adapter: prompt_embeddings are {prompt.shape[1]} wide, the model's embeddings {width}; is this "
                "the adapter's base model?"
            )


def _check_same_method(model: Any, values: dict[str, Any]) -> None:
    """What no tensor's shape shows: that an adapted model scales its updates as the file's config says."""
    config = model.peftkern_config
    kinds = {"lora": "LORA", "qlora": "LORA", "prompt": "PROMPT_TUNING", "ptuning_v2": "PREFIX_TUNING"}
    kind = values.get("peft_type")
    if kind != kinds.get(config.method, OWN_ADAPTER):
        raise ValueError(
            f"load_adapter: the model is adapted with {config.method!r}, the file holds {kind!r}; load it into the "
            "base model"
        )
    if isinstance(config, AdapterConfig):
        for name in ("hidden_act", "placement", "scaling"):
            if values.get(name) != getattr(config, name):
                raise ValueError(
                    f"load_adapter: the model's adapters have {name} {getattr(config, name)!r}, the file "
                    f"{values.get(name)!r}; load it into the base model"
                )
    if not isinstance(config, LoRAConfig):
        return
    refuse_unsupported(values)
    layers = {_clean(name): module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, plan in layer_plans(values, layers).items():
        layer, rslora = layers[name], bool(values.get("use_rslora", False))
        if (plan.lora_alpha, rslora) != (layer.lora_alpha, layer.use_rslora):
            raise ValueError(
                f"load_adapter: {name} has lora_alpha {layer.lora_alpha} and use_rslora {layer.use_rslora}, the file "
                f"{plan.lora_alpha} and {rslora}; load it into the base model"
            )


def _add_saved_embeddings(model: nn.Module, config: LoRAConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """PEFT adds the embeddings to the file when the vocabulary was resized; take them like modules_to_save."""
    names = [name for name, _ in model.named_modules() if f"{PREFIX}{name}.weight" in tensors]
    listed = set(saved_module_names(model, config.modules_to_save))
    ends = ("get_input_embeddings", "get_output_embeddings")
    ours = [getattr(model, end)() for end in ends if hasattr(model, end)]
    extra = [n for n in names if n not in listed and any(model.get_submodule(n) is module for module in ours)]
    if extra:
        config.modules_to_save = [*(config.modules_to_save or []), *extra]


def _adopt_dtypes(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives lora_A and lora_B the file's dtype, so that bfloat16 adapters stay bfloat16."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for part, parameter in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
                parameter.data = parameter.data.to(tensors[f"{PREFIX}{name}.{part}.weight"].dtype)


def _drop_duplicates(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the copies that PEFT stores of modules_to_save's biases when bias is "all"."""

    def plain(key: str) -> str:
        return key.replace(".original_module.", ".").replace(".modules_to_save.", ".")

    return {key: tensor for key, tensor in tensors.items() if plain(key) == key or plain(key) not in tensors}


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    pickle = folder / "adapter_model.bin"
    if not (folder / TENSORS).exists() and pickle.exists():
        raise ValueError(
            f"load_adapter: {pickle} is a pickle, which can run code when loaded, so it is refused; "
            f"{conversion_cure(pickle.name)}"
        )
    return load_safetensors(folder / TENSORS)


def _own_config(folder: Path) -> dict[str, Any]:
    """What `save_adapter` kept of our config; {} where PEFT saved the file."""
    text = load_safetensors_metadata(folder / TENSORS).get(_METADATA, "{}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"load_adapter: {folder / TENSORS} has damaged metadata; copy or save it again")
    return values


def _config_of(model: nn.Module, who: str) -> MethodConfig:
    config = getattr(model, "peftkern_config", None)
    if not isinstance(config, MethodConfig):
        raise ValueError(f"{who}: {type(model).__name__} has no adapter; call peftkern.apply(model, config) first")
    return config


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def _clean(name: str) -> str:
    """A module's name without what per-layer compilation and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach() for key, tensor in tensors.items()}
