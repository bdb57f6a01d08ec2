"""PTuningV2: trained keys and values at every layer, and `apply_ptuning_v2`, which gives a model some."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from peftkern.nn._virtual_tokens import check_causal_model

PTUNING_NAME = "ptuning_v2"  # of the submodule that a model gets
_ENCODER = "prefix_encoder."  # PEFT ignores what is saved under it
_INIT_STD = 0.02


class PTuningV2(nn.Module):
    """num_tokens trained keys and values for every attention layer, which every query sees before the text's own.

    Without projection they are parameters, N(0, 0.02) at the start. With it they are computed from num_tokens trained
    embeddings by Linear, tanh, Linear, which trains more steadily at some tasks; what is served can drop the MLP (see
    `flatten_`). Either way the prefix of a layer depends on that layer's parameters and the shared first Linear alone,
    and is computed where it is used: a layer that is recomputed under activation checkpointing recomputes its prefix.
    (DistributedDataParallel refuses parameters shared by reentrantly checkpointed layers, so a projection under both
    needs use_reentrant=False.)

    No start is a no-op: also keys and values of zero take their share of the softmax from the text.

    Args:
        num_layers: attention layers of the model.
        num_tokens: prefix length, 20 to 128 is usual.
        num_kv_heads: key and value heads of a layer; fewer than its query heads under grouped-query attention.
        head_dim: size of a head.
        projection: compute the prefix by an MLP.
        projection_hidden_size: width of that MLP.
        dropout: share of the keys' and values' elements zeroed while training, in [0, 1).
        device, dtype: of the parameters; the prefix is converted to the dtype of the keys that it joins.

    Attributes:
        enabled: False makes the module, and a model that has it, do nothing.

    Raises:
        ValueError: naming the argument.

    Source: Liu et al. 2021, arXiv:2110.07602; the MLP: Li and Liang 2021, arXiv:2101.00190, section 4.3.
    """

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        projection: bool = False,
        projection_hidden_size: int = 512,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "num_tokens": num_tokens, "num_kv_heads": num_kv_heads}
        sizes |= {"head_dim": head_dim, "projection_hidden_size": projection_hidden_size}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"PTuningV2: {name} must be a positive integer, got {value!r}; 20 tokens are usual")
        if not 0 <= dropout < 1:
            raise ValueError(f"PTuningV2: dropout must be in [0, 1), got {dropout!r}; 0 is usual")
        self.num_layers, self.num_tokens = num_layers, num_tokens
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.projection, self.projection_hidden_size = bool(projection), projection_hidden_size
        self.dropout = float(dropout)
        self.enabled = True
        kv_dim = num_kv_heads * head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # One parameter a layer: the gradient of a slice of one large parameter would be as large as that parameter, for
        # every layer, and reentrant checkpointing under DDP allows a parameter to be used in one layer only.
        if self.projection:
            self.embedding = nn.Parameter(torch.empty(num_tokens, kv_dim, **factory))
            self.hidden = nn.Linear(kv_dim, projection_hidden_size, **factory)
            self.output = nn.ModuleList(
                nn.Linear(projection_hidden_size, 2 * kv_dim, **factory) for _ in range(num_layers)
            )
        else:
            self.prefix = nn.ParameterList(torch.empty(num_tokens, 2 * kv_dim, **factory) for _ in range(num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        if self.projection:
            nn.init.normal_(self.embedding)
            self.hidden.reset_parameters()
            for linear in self.output:
                nn.init.normal_(linear.weight, std=_INIT_STD)  # type: ignore[arg-type]
                nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        else:
            for prefix in self.prefix:
                nn.init.normal_(prefix, std=_INIT_STD)

    def layer_prefix(self, layer_idx: int, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of one layer, each [batch_size, num_kv_heads, num_tokens, head_dim], dropout applied."""
        flat = self._layer(layer_idx).expand(batch_size, -1, -1)
        if self.training and self.dropout:
            flat = nn.functional.dropout(flat, self.dropout)
        keys, values = flat.unflatten(-1, (2, self.num_kv_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, batch_size: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's keys and values, for models that put them into their attention themselves."""
        return [self.layer_prefix(layer, batch_size) for layer in range(self.num_layers)]

    def peftkern_state(self) -> dict[str, torch.Tensor]:
        """What is saved, detached.

        "prompt_embeddings" [num_tokens, num_layers * 2 * num_kv_heads * head_dim] in PEFT's order (layer; keys, values;
        head; element), without dropout; with projection besides, which PEFT ignores, "prefix_encoder.embedding.weight",
        "prefix_encoder.transform.0.weight" and ".bias", "prefix_encoder.transform.2.weight" and ".bias".
        """
        with torch.no_grad():
            state = {"prompt_embeddings": torch.cat([self._layer(i) for i in range(self.num_layers)], dim=1)}
            if self.projection:
                state[f"{_ENCODER}embedding.weight"] = self.embedding.detach()
                state[f"{_ENCODER}transform.0.weight"] = self.hidden.weight.detach()
                state[f"{_ENCODER}transform.0.bias"] = self.hidden.bias.detach()
                state[f"{_ENCODER}transform.2.weight"] = torch.cat([o.weight for o in self.output])  # type: ignore[misc]
                state[f"{_ENCODER}transform.2.bias"] = torch.cat([o.bias for o in self.output])  # type: ignore[misc]
        return state

    @torch.no_grad()
    def load_peftkern_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies what `peftkern_state` gave, or PEFT saved, converting dtype and device.

        A file without the MLP, as PEFT writes it, into a module with one: the prefix is what the file holds, and the
        module drops its MLP, with a warning. Make the optimizer after loading.

        Raises:
            ValueError: a missing or unknown key, or another shape; nothing is changed then.
        """
        width = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        expected: dict[str, tuple[int, ...]] = {"prompt_embeddings": (self.num_tokens, width)}
        drops_encoder = self.projection and set(state) == set(expected)
        if self.projection and not drops_encoder:
            expected = {key: tuple(tensor.shape) for key, tensor in self.peftkern_state().items()}
        if missing := [key for key in expected if key not in state]:
            raise ValueError(f"PTuningV2: {missing[0]} is missing; is the file one of P-tuning v2 or prefix tuning?")
        if unknown := [key for key in state if key not in expected]:
            raise ValueError(f"PTuningV2: {unknown[0]} has no place here; check projection in the file's config")
        for key, shape in expected.items():
            if tuple(state[key].shape) != shape:
                raise ValueError(
                    f"PTuningV2: {key} must be {shape}, got {tuple(state[key].shape)}; check num_tokens, "
                    "projection_dim and the base model"
                )
        if drops_encoder:
            warnings.warn("PTuningV2: the file has no projection MLP; going on with its prefix alone", stacklevel=2)
            self.flatten_()
        if self.projection:
            self.embedding.copy_(state[f"{_ENCODER}embedding.weight"])
            self.hidden.weight.copy_(state[f"{_ENCODER}transform.0.weight"])
            self.hidden.bias.copy_(state[f"{_ENCODER}transform.0.bias"])
            weights = state[f"{_ENCODER}transform.2.weight"].chunk(self.num_layers)
            biases = state[f"{_ENCODER}transform.2.bias"].chunk(self.num_layers)
            for linear, weight, bias in zip(self.output, weights, biases):
                linear.weight.copy_(weight)  # type: ignore[operator, union-attr]
                linear.bias.copy_(bias)  # type: ignore[operator, union-attr]
        else:
            for prefix, values in zip(self.prefix, state["prompt_embeddings"].chunk(self.num_layers, dim=1)):
                prefix.copy_(values)

    @torch.no_grad()
    def flatten_(self) -> None:
        """Replaces the projection MLP by the prefix that it computes now. Without projection it does nothing."""
        if not self.projection:
            return
        prefix = [self._layer(i) for i in range(self.num_layers)]
        trains = self.embedding.requires_grad
        del self.embedding, self.hidden, self.output
        self.prefix = nn.ParameterList(nn.Parameter(layer, requires_grad=trains) for layer in prefix)
        self.projection = False

    def extra_repr(self) -> str:
        """What `print` shows besides the layers."""
        return (
            f"num_layers={self.num_layers}, num_tokens={self.num_tokens}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, dropout={self.dropout}"
        )

    def _layer(self, layer_idx: int) -> torch.Tensor:
        """The prefix of one layer, [num_tokens, 2 * num_kv_heads * head_dim]."""
        if self.projection:
            return self.output[layer_idx](torch.tanh(self.hidden(self.embedding)))
        return self.prefix[layer_idx]


def apply_ptuning_v2(model: nn.Module, config: Any) -> nn.Module:
    """Freezes `model` and gives it a trainable prefix at every layer, `model.ptuning_v2`. In place; the class stays.

    Forward hooks show the prefix to the attention layers as num_tokens positions before the text, which therefore
    starts at position num_tokens, as in PEFT's prefix tuning. Callers pass what belongs to the text alone: masks,
    position_ids and cache have the text's length, and logits come back for it. The prefix is never stored in a cache,
    so that caches of any kind, `generate`, beams and left padding work as in the base model. Under activation
    checkpointing, reentrant or not, each layer recomputes its own prefix. While training no cache is made unless asked
    for by use_cache=True.

    Args:
        model: a decoder-only Transformers model whose layers are all attention layers with keys and values of one
            size, such as Llama, Mistral, Qwen, Gemma 2 and 3, GPT-2, GPT-NeoX, OPT, BLOOM, Falcon, Phi.
        config: num_tokens, projection, projection_dim and dropout of a PTuningV2Config.

    Raises:
        TypeError: a model that is none.
        ValueError: its layers are not such, or it has a prefix already.
    """
    text_config = check_causal_model("apply_ptuning_v2", model)
    if hasattr(model, PTUNING_NAME):
        raise ValueError("apply_ptuning_v2: the model has a prefix already; start from the base model")
    from peftkern.nn._prefix_hooks import find_decoder, register_prefix_hooks

    decoder = find_decoder(model, text_config)
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    model.requires_grad_(False)
    ptuning = PTuningV2(
        len(decoder.attention),
        config.num_tokens,
        decoder.num_kv_heads,
        decoder.head_dim,
        config.projection,
        config.projection_dim,
        config.dropout,
        device=weight.device,
        dtype=torch.promote_types(weight.dtype, torch.float32),
    )
    model.add_module(PTUNING_NAME, ptuning.train(model.training))
    register_prefix_hooks(decoder, ptuning)
    return model
