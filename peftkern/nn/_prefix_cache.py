"""A Transformers cache that shows a trained prefix before the text, which another cache holds or none."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from peftkern.nn.ptuning import PTuningV2


class PrefixCache(Cache):
    """What a cache of num_tokens prefix tokens and then the text would say of itself, over a cache of the text alone.

    The prefix is computed at each `update`, from the module's parameters, and not stored. Without a text cache nothing
    is stored at all: each call sees the prefix and its own keys, as often as it is made. In a sliding-window layer the
    prefix counts as the positions before the text, and falls out of the window like them.

    Args:
        ptuning: gives the prefix.
        text: the caller's cache, or None.

    Raises:
        ValueError: a static cache with sliding-window layers, which has no place for what precedes its window.
    """

    def __init__(self, ptuning: PTuningV2, text: Cache | None = None) -> None:
        # Not Cache.__init__, which would make storage of its own; the list is shared, for what Cache's properties say.
        self.ptuning, self.text = ptuning, text
        self.layers = [] if text is None else text.layers
        self.layer_class_to_replicate = None
        self.offloading = False
        if text is not None and text.is_compileable and any(text.is_sliding):
            raise ValueError(
                "PTuningV2: a static cache with sliding-window layers cannot be used; leave cache_implementation at "
                "'dynamic'"
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, T, head_dim] -> those of the prefix, the cached text and these, in that order."""
        expected = (self.ptuning.num_kv_heads, self.ptuning.head_dim)
        for states in (key_states, value_states):
            if (states.shape[1], states.shape[3]) != expected:
                raise ValueError(
                    f"PTuningV2: layer {layer_idx} has {states.shape[1]} key-value heads of size {states.shape[3]}, "
                    f"the prefix {expected[0]} of size {expected[1]}; P-tuning v2 does not fit this model, use LoRA"
                )
        in_window = not self._window_is_full(layer_idx)  # as the mask was made, before this update
        if self.text is not None:
            args = tuple(self._of_text(arg) for arg in args)
            kwargs = {name: self._of_text(value) for name, value in kwargs.items()}
            key_states, value_states = self.text.update(key_states, value_states, layer_idx, *args, **kwargs)
        if not in_window:
            return key_states, value_states
        keys, values = self.ptuning.layer_prefix(layer_idx, key_states.shape[0])
        return (
            torch.cat((keys.to(key_states), key_states), dim=2),
            torch.cat((values.to(value_states), value_states), dim=2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Length of prefix and cached text."""
        text = 0 if self.text is None else self.text.get_seq_length(layer_idx)
        return self.ptuning.num_tokens + text

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Keys that a query of `query_length` tokens meets, and the position of the first.

        Transformers before 5.6 or so passes the positions of the query, a tensor, in place of its length.
        """
        num_tokens = self.ptuning.num_tokens
        if self.text is None:
            length = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
            return num_tokens + length, 0
        if isinstance(query_length, torch.Tensor):
            query_length = query_length - num_tokens
        length, offset = self.text.get_mask_sizes(query_length, layer_idx)
        if self._window_is_full(layer_idx):
            return length, num_tokens + offset
        return num_tokens + length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most that the cache can hold, prefix included; -1 where there is no limit."""
        length = -1 if self.text is None else self.text.get_max_length(layer_idx)
        return length if length < 0 else self.ptuning.num_tokens + length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` of one layer, as earlier Transformers call it."""
        text: Any = self.text
        length = -1 if text is None else text.get_max_cache_shape(layer_idx)
        return length if length < 0 else self.ptuning.num_tokens + length

    def _window_is_full(self, layer_idx: int) -> bool:
        """Whether a sliding-window layer has dropped text already: the prefix is out of its window then."""
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return bool(getattr(layer, "is_sliding", False)) and layer.cumulative_length >= layer.sliding_window

    def _of_text(self, argument: Any) -> Any:
        """What earlier Transformers pass to `update`, with the positions that the text has without a prefix."""
        if isinstance(argument, dict) and isinstance(argument.get("cache_position"), torch.Tensor):
            return {**argument, "cache_position": argument["cache_position"] - self.ptuning.num_tokens}
        return argument
