"""How a Transformers decoder gets the prefix of P-tuning v2: hooks on its model, its layers and their attention.

The decoder's pre-hook passes a PrefixCache, so that the model itself makes masks and positions with room for the
prefix, for every attention implementation. Checkpointed layers take their cache away before they run; the attention's
pre-hook gives them a new one. It can, as that cache only reads: it holds no text, and joins the prefix to the keys of
the call.

The hooks are objects of module-level classes, so that a model with them copies and pickles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from transformers import Cache, DynamicCache, PreTrainedModel

from peftkern.nn._prefix_cache import PrefixCache
from peftkern.nn._virtual_tokens import (
    by_name,
    check_position,
    check_unpacked,
    extended_mask,
    parameter_names,
    position_limit,
    sequence_length,
    text_positions,
)
from peftkern.nn.ptuning import PTuningV2

_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class Decoder(NamedTuple):
    """What the hooks need to know of a model."""

    model: Any  # the module that makes masks and positions, such as LlamaModel
    layers: list[nn.Module]
    attention: list[nn.Module]  # by layer index
    config: Any
    num_kv_heads: int
    head_dim: int


class PrefixDecoder:
    """Pre-hook (with kwargs) of the decoder: masks, positions and a cache with the prefix in front."""

    def __init__(self, ptuning: PTuningV2, decoder: Decoder) -> None:
        self.ptuning, self.config = ptuning, decoder.config
        self.names, self.limit = parameter_names(decoder.model), position_limit(decoder.model)
        self.layers = decoder.layers

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        inputs = by_name(self.names, args, kwargs)
        cache = inputs.get("past_key_values")
        if not self.ptuning.enabled or isinstance(cache, PrefixCache):
            return None
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                "PTuningV2: past_key_values must be a transformers Cache such as DynamicCache(), got "
                f"{type(cache).__name__}; pass that"
            )
        check_unpacked("PTuningV2", inputs)
        num_tokens, length = self.ptuning.num_tokens, sequence_length(inputs)
        recomputes = model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
        cache = self._cache(inputs, model.training, recomputes)
        seen = 0 if cache is None else cache.get_seq_length()
        text = seen + length if isinstance(seen, int) else None
        check_position("PTuningV2", self.limit, num_tokens, text)
        mask = inputs.get("attention_mask")
        given = inputs.get("position_ids")
        if given is None and "position_ids" in self.names and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            given = text_positions(mask, length)
        for name, positions in (("position_ids", given), ("cache_position", inputs.get("cache_position"))):
            if positions is not None:
                inputs[name] = positions + num_tokens
        # Reentrant checkpointing computes no gradients unless a layer's input requires one. For input_ids Transformers
        # sees to that.
        if recomputes and isinstance(embeds := inputs.get("inputs_embeds"), torch.Tensor) and not embeds.requires_grad:
            inputs["inputs_embeds"] = embeds.detach().requires_grad_(torch.is_grad_enabled())
        inputs["attention_mask"] = widened_mask(mask, num_tokens, text)
        inputs["past_key_values"] = PrefixCache(self.ptuning, cache)
        return (), inputs

    def _cache(self, inputs: dict[str, Any], training: bool, recomputes: bool) -> Cache | None:
        """The cache for the text: the caller's, a new one where one is wanted, or None."""
        cache = inputs.get("past_key_values")
        wanted = inputs.get("use_cache")
        if recomputes:
            if cache is not None and (wanted or cache.get_seq_length()):
                raise ValueError(
                    "PTuningV2: gradient checkpointing does not go with a cache while training; call model.eval() to "
                    "generate, or pass use_cache=False"
                )
            cache = None
        elif cache is None:
            if wanted is None:
                wanted = not training and getattr(self.config, "use_cache", False)
            cache = DynamicCache(config=self.config) if wanted else None
        if cache is None and "use_cache" in self.names:
            inputs["use_cache"] = False
        return cache


class UnwrapCache:
    """Forward hook of the decoder: the caller gets the cache of its text, without the prefix's wrapping."""

    def __call__(self, model: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            if not any(isinstance(value, PrefixCache) for value in output):
                return None
            values = (value.text if isinstance(value, PrefixCache) else value for value in output)
            return tuple(value for value in values if value is not None)
        if isinstance(cache := getattr(output, "past_key_values", None), PrefixCache):
            return type(output)(**{**output, "past_key_values": cache.text})
        return None


class DropPrefix:
    """Pre-hook (with kwargs) of a layer: takes away a cache without text, which checkpointing would warn about."""

    def __call__(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        for name in _CACHE_NAMES:
            cache = kwargs.get(name)
            if isinstance(cache, PrefixCache) and cache.text is None:
                return args, {**kwargs, name: None}
        return None


class GivePrefix:
    """Pre-hook (with kwargs) of an attention module: gives it the prefix where it comes without a cache."""

    def __init__(self, ptuning: PTuningV2, name: str) -> None:
        self.ptuning, self.name = ptuning, name

    def __call__(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.ptuning.enabled or kwargs.get(self.name) is not None:
            return None
        return args, {**kwargs, self.name: PrefixCache(self.ptuning)}


def widened_mask(mask: Any, num_tokens: int, text_length: int | None) -> Any:
    """An attention mask with columns for the prefix, which every query sees.

    Args:
        mask: None; a padding mask [B, text]; a prepared mask [B, heads or 1, queries, keys], boolean or additive; or a
            dict of such, by kind of layer.
        num_tokens: length of the prefix.
        text_length: what a padding mask must cover; None to leave it unchecked.

    Raises:
        ValueError: anything else.
    """
    if isinstance(mask, dict):
        # None means that the text alone needs no mask; with the prefix it does, and the model makes it.
        if any(one is None for one in mask.values()):
            return None
        return {kind: widened_mask(one, num_tokens, text_length) for kind, one in mask.items()}
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        return nn.functional.pad(mask, (num_tokens, 0), value=mask.dtype == torch.bool)
    return extended_mask("PTuningV2", mask, num_tokens, text_length)


def find_decoder(model: nn.Module, config: Any) -> Decoder:
    """The parts of a model that `register_prefix_hooks` needs.

    Raises:
        ValueError: not every layer has attention with keys and values that a prefix of one size fits.
    """

    def unsupported(reason: str) -> ValueError:
        return ValueError(
            f"apply_ptuning_v2: {type(model).__name__} {reason}; it takes decoders of plain attention layers, such as "
            "Llama, Qwen, Mistral, Gemma 2 and GPT-2; LoRA and adapters take this model"
        )

    types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if types:
        raise unsupported(f"has layers of type {', '.join(sorted(types))}")
    if getattr(config, "kv_lora_rank", None) or getattr(config, "num_kv_shared_layers", 0):
        raise unsupported("compresses or shares its keys and values")
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        if isinstance(index, int) and not getattr(module, "is_cross_attention", False) and _cache_name(module):
            # A layer's own index comes before that of the attention in it, which is the one wanted.
            if index in found and not name.startswith(f"{found[index][0]}."):
                raise unsupported(f"has two attention modules of layer {index}, {found[index][0]} and {name}")
            found[index] = (name, module)
    count = getattr(config, "num_hidden_layers", None)
    if sorted(found) != list(range(len(found))) or len(found) != count:
        raise unsupported(f"has {len(found)} attention modules that take a cache for its {count} layers")
    attention = [found[index][1] for index in range(len(found))]
    if not all(getattr(module, "is_causal", True) for module in attention):
        raise unsupported("is an encoder")
    owner, layers = _owner_and_layers(model, [found[index][0] for index in range(len(found))])
    if owner is None or "past_key_values" not in parameter_names(owner):
        raise unsupported("has no decoder that takes past_key_values")
    return Decoder(owner, layers, attention, config, *_kv_shape(config))


def register_prefix_hooks(decoder: Decoder, ptuning: PTuningV2) -> None:
    """Registers this file's hooks on a model's parts."""
    decoder.model.register_forward_pre_hook(PrefixDecoder(ptuning, decoder), with_kwargs=True)
    decoder.model.register_forward_hook(UnwrapCache())
    for layer in decoder.layers:
        layer.register_forward_pre_hook(DropPrefix(), with_kwargs=True)
    for module in decoder.attention:
        module.register_forward_pre_hook(GivePrefix(ptuning, _cache_name(module)), with_kwargs=True)


def _cache_name(module: nn.Module) -> str:
    """The parameter by which an attention module takes its cache, or ""."""
    names = parameter_names(module)
    return next((name for name in _CACHE_NAMES if name in names), "")


def _owner_and_layers(model: nn.Module, attention: list[str]) -> tuple[Any, list[nn.Module]]:
    """The innermost Transformers model around all attention modules, and the layers that it holds them in."""
    owner_name, owner = "", None
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, PreTrainedModel) and all(path.startswith(prefix) for path in attention):
            owner_name, owner = prefix, module
    layers = []
    for path in attention:
        parts = path[len(owner_name) :].split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is None:
            return None, []
        layers.append(model.get_submodule(owner_name + ".".join(parts[: index + 1])))
    return owner, layers


def _kv_shape(config: Any) -> tuple[int, int]:
    """Key-value heads and size of a head, from a config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon and GPT-BigCode
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
