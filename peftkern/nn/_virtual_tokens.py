"""What prompt tuning and P-tuning v2 share: the arguments of a model's forward, seen with tokens that no text has.

Callers go on speaking of the text alone: masks, positions and labels of the text's length. `num_tokens` virtual tokens
stand before it, and what is passed on to the model accounts for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

# What data collators without padding and FlashAttention's packed batches pass along.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of `module.forward`, in order, without *args and **kwargs."""
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def by_name(names: tuple[str, ...], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    return dict(zip(names, args)) | dict(kwargs)


def check_causal_model(what: str, model: nn.Module) -> Any:
    """The config of the text model inside `model`, a Transformers model that takes virtual tokens.

    Raises:
        TypeError: not a Transformers model, an encoder-decoder model, or one without inputs_embeds or key-value cache.
    """
    supported = "it takes decoder-only Transformers models (AutoModelForCausalLM); LoRA and adapters take any model"
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"{what}: {type(model).__name__} is no Transformers model; {supported}")
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{what}: {type(model).__name__} is an encoder-decoder model; {supported}")
    for name in ("inputs_embeds", "past_key_values"):
        if name not in parameter_names(model):  # a state-space model, say
            raise TypeError(f"{what}: {type(model).__name__}.forward takes no {name}; {supported}")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_unpacked(what: str, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for a packed batch: its later texts would not see the virtual tokens at its start."""
    for name in _PACKED:
        if inputs.get(name) is not None:
            raise ValueError(f"{what}: packed batches ({name}) do not go with it; pad the texts to one length instead")


def sequence_length(inputs: Mapping[str, Any]) -> int:
    """The number of text positions in a call, 0 where it has neither input_ids nor inputs_embeds."""
    for name in ("inputs_embeds", "input_ids"):
        if inputs.get(name) is not None:
            return inputs[name].shape[1]
    return 0


def extended_mask(what: str, mask: Any, num_tokens: int, text_length: int | None) -> Any:
    """A padding mask [B, text] as [B, num_tokens + text], the virtual tokens visible. None stays None.

    Args:
        what: for messages.
        mask: of the whole text so far, cached part included.
        num_tokens: virtual tokens before the text.
        text_length: the length that `mask` must have; None to leave it unchecked.

    Raises:
        ValueError: a mask of another length or rank.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"{what}: attention_mask must be a padding mask [batch, length], got {found}; pass that one")
    if text_length is not None and mask.shape[1] != text_length:
        raise ValueError(
            f"{what}: attention_mask must cover the text so far, {text_length} tokens, got {mask.shape[1]}; leave the "
            "virtual tokens out of it, and with a filled cache pass only the new tokens' ids and the whole text's mask"
        )
    return torch.cat((mask.new_ones(mask.shape[0], num_tokens), mask), dim=1)


def text_positions(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [B, length] of the last tokens under a padding mask [B, text]: padding does not count."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)[:, mask.shape[1] - length :]


def position_limit(model: nn.Module) -> int | None:
    """How many positions a model with learned position embeddings has; None for the others."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("wpe", "embed_positions"):
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


def check_position(what: str, limit: int | None, num_tokens: int, text_length: Any) -> None:
    """Raises ValueError where the text and the virtual tokens exceed the learned position embeddings."""
    if limit is not None and isinstance(text_length, int) and num_tokens + text_length > limit:
        raise ValueError(
            f"{what}: the model has {limit} positions, too few for {num_tokens} virtual and {text_length} text tokens; "
            f"cut the text to {max(0, limit - num_tokens)}"
        )
