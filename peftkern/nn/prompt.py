"""PromptTuning: trained embeddings before the text's own, and `apply_prompt_tuning`, which gives a model some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from peftkern.nn._virtual_tokens import (
    by_name,
    check_causal_model,
    check_position,
    check_unpacked,
    extended_mask,
    parameter_names,
    position_limit,
    sequence_length,
    text_positions,
)

PROMPT_NAME = "prompt_tuning"  # of the submodule that a model gets
IGNORED_LABEL = -100
# On a cache: how many of its positions are the prompt's. Nothing else can tell later calls.
_CACHED = "_peftkern_prompt_tokens"
# What has one entry per text token, and the value that the prompt's tokens get.
_PER_TOKEN = {
    "labels": IGNORED_LABEL,
    "shift_labels": IGNORED_LABEL,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
_POOLING = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
_INIT_STD = 0.02


class PromptTuning(nn.Module):
    """num_tokens trained embeddings that stand before a text's embeddings.

    Args:
        num_tokens: how many, 20 to 100 is usual.
        token_dim: size of the model's token embeddings.
        initialize_from_vocab: start as the embeddings of randomly drawn tokens. Without `embedding` the start is
            N(0, 0.02) until `initialize_from_vocab_` is called, which `apply_prompt_tuning` does.
        embedding: nn.Embedding or weight [vocabulary, token_dim] to start from.
        token_ids: rows of `embedding` to start from in place of random ones, repeated or cut to num_tokens.
        device, dtype: of the parameter; it is converted to the embeddings' dtype when it is used.

    Attributes:
        prompt_embeddings: nn.Parameter [num_tokens, token_dim].
        enabled: False makes the module, and a model that has it, do nothing.

    Raises:
        ValueError: naming the argument.

    Source: Lester et al. 2021, arXiv:2104.08691.
    """

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        initialize_from_vocab: bool = True,
        *,
        embedding: nn.Module | torch.Tensor | None = None,
        token_ids: list[int] | torch.Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_tokens", num_tokens), ("token_dim", token_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"PromptTuning: {name} must be a positive integer, got {value!r}; 20 tokens are usual")
        if token_ids is not None and embedding is None:
            raise ValueError("PromptTuning: token_ids needs the embedding whose rows they are; pass embedding")
        self.num_tokens, self.token_dim = num_tokens, token_dim
        self.initialize_from_vocab = bool(initialize_from_vocab)
        self.enabled = True
        self.prompt_embeddings = nn.Parameter(torch.empty(num_tokens, token_dim, device=device, dtype=dtype))
        nn.init.normal_(self.prompt_embeddings, std=_INIT_STD)
        if embedding is not None and (initialize_from_vocab or token_ids is not None):
            self.initialize_from_vocab_(embedding, token_ids)

    @torch.no_grad()
    def initialize_from_vocab_(
        self, embedding: nn.Module | torch.Tensor, token_ids: list[int] | torch.Tensor | None = None
    ) -> None:
        """Sets the prompt to rows of a model's token embeddings.

        Args:
            embedding: nn.Embedding or weight [vocabulary, token_dim]. A module is called, so that what it does to its
                rows (a scale, say) is in the prompt too.
            token_ids: which rows, repeated or cut to num_tokens; None draws them from torch's CPU generator.

        Raises:
            ValueError: rows of another size, ids outside the vocabulary, or no ids.
        """
        weight: Any = embedding if isinstance(embedding, torch.Tensor) else embedding.weight
        vocabulary = weight.shape[0]
        if token_ids is None:
            ids = torch.randint(0, vocabulary, (self.num_tokens,))
        else:
            ids = torch.as_tensor(token_ids, dtype=torch.long).flatten().cpu()
            if ids.numel() == 0:
                raise ValueError("PromptTuning: token_ids must name at least one token; is the text empty?")
            if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
                raise ValueError(
                    f"PromptTuning: token_ids must be in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}; "
                    "use the model's own tokenizer"
                )
            ids = ids.repeat(-(-self.num_tokens // ids.numel()))[: self.num_tokens]
        ids = ids.to(weight.device)
        rows = embedding[ids] if isinstance(embedding, torch.Tensor) else embedding(ids)
        if rows.shape[-1] != self.token_dim:
            raise ValueError(
                f"PromptTuning: token_dim must be the size of the model's embeddings, {rows.shape[-1]}, got "
                f"{self.token_dim}; take model.get_input_embeddings().embedding_dim"
            )
        self.prompt_embeddings.copy_(rows)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The prompt before a batch of texts, for models that call this module themselves.

        Args:
            inputs_embeds: [B, T, token_dim], any float dtype.
            attention_mask: [B, T] or None.
            labels: [B, T] or None.

        Returns:
            inputs_embeds [B, num_tokens + T, token_dim] in its dtype; the mask with ones and the labels with -100 in
            front. All as they were where `enabled` is False.

        Raises:
            ValueError: embeddings of another size.
        """
        if not self.enabled:
            return inputs_embeds, attention_mask, labels
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.token_dim:
            raise ValueError(
                f"PromptTuning: inputs_embeds must be [batch, length, {self.token_dim}], got "
                f"{tuple(inputs_embeds.shape)}; token_dim is the size of the model's embeddings"
            )
        prompt = self.prompt_embeddings.to(inputs_embeds).expand(inputs_embeds.shape[0], -1, -1)
        return (
            torch.cat((prompt, inputs_embeds), dim=1),
            extended_mask("PromptTuning", attention_mask, self.num_tokens, inputs_embeds.shape[1]),
            None if labels is None else _prepended(labels, self.num_tokens, IGNORED_LABEL),
        )

    def peftkern_state(self) -> dict[str, torch.Tensor]:
        """What is saved, under PEFT's name: {"prompt_embeddings": [num_tokens, token_dim]}, detached."""
        return {"prompt_embeddings": self.prompt_embeddings.detach()}

    @torch.no_grad()
    def load_peftkern_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies what `peftkern_state` gave, or PEFT saved, converting dtype and device.

        Raises:
            ValueError: a missing or unknown key, or another shape.
        """
        if set(state) != {"prompt_embeddings"}:
            raise ValueError(
                f"PromptTuning: the file must hold prompt_embeddings and nothing else, got {sorted(state)}"
            )
        found = tuple(state["prompt_embeddings"].shape)
        if found != (self.num_tokens, self.token_dim):
            raise ValueError(
                f"PromptTuning: prompt_embeddings must be {(self.num_tokens, self.token_dim)}, got {found}; check "
                "num_tokens and the base model"
            )
        self.prompt_embeddings.copy_(state["prompt_embeddings"])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_tokens={self.num_tokens}, token_dim={self.token_dim}"


class PrependPrompt:
    """Forward pre-hook (with kwargs) of a model: puts the prompt before its input.

    The hooks of this package are objects of module-level classes, so that a model with them copies and pickles.
    """

    def __init__(self, names: tuple[str, ...], limit: int | None) -> None:
        self.names, self.limit = names, limit

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        prompt: PromptTuning = model.prompt_tuning
        inputs = by_name(self.names, args, kwargs)
        length = sequence_length(inputs)
        cached = cached_text(prompt, inputs.get("past_key_values"))
        if not prompt.enabled or not length:
            return None
        check_unpacked("PromptTuning", inputs)
        text = length if cached is None else cached + length
        check_position("PromptTuning", self.limit, prompt.num_tokens, text)
        if cached is not None:
            check_continuation(inputs, cached)
        computes = "position_ids" in self.names
        extend_positions(inputs, prompt.num_tokens, length, prefill=cached is None, computes=computes)
        if cached is not None:
            mask = inputs.get("attention_mask")
            inputs["attention_mask"] = extended_mask("PromptTuning", mask, prompt.num_tokens, text)
            return (), inputs
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = model.get_input_embeddings()(inputs["input_ids"])
        inputs["input_ids"] = None
        inputs["inputs_embeds"], inputs["attention_mask"], _ = prompt(embeds, inputs.get("attention_mask"))
        for name, value in _PER_TOKEN.items():
            if isinstance(inputs.get(name), torch.Tensor):
                inputs[name] = _prepended(inputs[name], prompt.num_tokens, value)
        if isinstance(keep := inputs.get("logits_to_keep"), torch.Tensor):
            inputs["logits_to_keep"] = keep + prompt.num_tokens
        return (), inputs


class MarkCache:
    """Forward hook of a model: notes on the cache that it filled that the prompt is in it."""

    def __call__(self, model: Any, args: Any, output: Any) -> None:
        if not model.prompt_tuning.enabled:
            return
        for value in output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),):
            if hasattr(value, "get_seq_length"):
                setattr(value, _CACHED, model.prompt_tuning.num_tokens)


def cached_text(prompt: PromptTuning, cache: Any) -> int | None:
    """How many text tokens `cache` holds behind the prompt; None for an empty cache or none.

    Raises:
        ValueError: a cache that cannot hold the prompt, was filled without it, or holds it while it is disabled.
    """
    if cache is None:
        return None
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(
            "PromptTuning: past_key_values must be a transformers Cache such as DynamicCache(), got "
            f"{type(cache).__name__}; pass that"
        )
    if not prompt.enabled and not getattr(cache, _CACHED, 0):
        return None
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            "PromptTuning: a static cache has no room for the prompt; leave cache_implementation at 'dynamic'"
        )
    seen = cache.get_seq_length()
    if seen == 0:
        return None
    held = getattr(cache, _CACHED, 0)
    if held != (prompt.num_tokens if prompt.enabled else 0):
        raise ValueError(
            f"PromptTuning: the cache was filled with {held} prompt tokens but the model has "
            f"{prompt.num_tokens if prompt.enabled else 0} now; start from an empty cache"
        )
    return seen - held


def check_continuation(inputs: Mapping[str, Any], cached: int) -> None:
    """Raises ValueError where `generate` took the prompt's positions in a cache for text, and so dropped new tokens.

    With padding the mask's length tells; without, `generate` passes no mask but positions, whose first is read here.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or torch.compiler.is_compiling():
        return
    first = int(positions.flatten()[0])
    if first != cached:
        raise ValueError(
            f"PromptTuning: the cache holds {cached} text tokens but position_ids go on at {first}; with a filled "
            "cache pass only the new tokens' ids and the whole text's attention_mask"
        )


def extend_positions(inputs: dict[str, Any], num_tokens: int, length: int, *, prefill: bool, computes: bool) -> None:
    """Moves position_ids behind the prompt, and at the prefill gives the prompt its own. In place.

    Where position_ids are missing, `computes` says to take them from the padding mask, so that left padding leaves a
    text as far from the prompt as no padding does.
    """
    # Of earlier Transformers, whose generate counts a cached prompt in some cases only; the model makes its own.
    inputs.pop("cache_position", None)
    mask = inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    if positions is None and computes and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        positions = text_positions(mask, length)
    if positions is None:
        return
    inputs["position_ids"] = positions + num_tokens
    if prefill:
        own = torch.arange(num_tokens, dtype=positions.dtype, device=positions.device).expand(*positions.shape[:-1], -1)
        inputs["position_ids"] = torch.cat((own, inputs["position_ids"]), dim=-1)


def apply_prompt_tuning(model: nn.Module, config: Any, tokenizer: Any = None) -> nn.Module:
    """Freezes `model` and gives it a trainable prompt, `model.prompt_tuning`. In place; the class stays.

    Forward hooks put the prompt before the text: embeddings in front of inputs_embeds, ones in front of attention_mask,
    -100 in front of labels, positions 0 to num_tokens - 1. Callers pass what belongs to the text alone, position_ids
    and, with a filled cache, the whole text's attention_mask included. Logits come back for the prompt's positions too,
    as from PEFT. `generate` works, with beams, left padding and a dynamic cache; a cache's length counts the prompt, so
    a later `generate` on the same cache takes the new tokens' ids and the whole text's mask.

    Args:
        model: a decoder-only Transformers model.
        config: num_tokens, init ("vocab", "text" or "random") and init_text of a PromptTuningConfig.
        tokenizer: the model's own, needed for init="text".

    Raises:
        TypeError: a model that is none, or no tokenizer where one is needed.
        ValueError: the model has a prompt already, or its head pools positions that the prompt moves.
    """
    check_causal_model("apply_prompt_tuning", model)
    if hasattr(model, PROMPT_NAME):
        raise ValueError("apply_prompt_tuning: the model has a prompt already; start from the base model")
    if type(model).__name__.endswith(_POOLING):
        raise TypeError(
            f"apply_prompt_tuning: {type(model).__name__} picks positions of the input, which a prompt moves; it takes "
            "causal language models, and P-tuning v2, LoRA and adapters take this one"
        )
    token_ids = None
    if config.init == "text":
        if tokenizer is None:
            raise TypeError("apply_prompt_tuning: init 'text' needs the model's tokenizer; pass tokenizer=")
        token_ids = tokenizer(config.init_text)["input_ids"]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    model.requires_grad_(False)
    prompt = PromptTuning(
        config.num_tokens,
        weight.shape[1],
        config.init == "vocab",
        embedding=None if config.init == "random" else embedding,
        token_ids=token_ids,
        device=weight.device,
        dtype=torch.promote_types(weight.dtype, torch.float32),
    )
    model.add_module(PROMPT_NAME, prompt.train(model.training))
    hook = PrependPrompt(parameter_names(model), position_limit(model))
    model.register_forward_pre_hook(hook, with_kwargs=True)
    model.register_forward_hook(MarkCache())
    return model


def _prepended(tensor: torch.Tensor, num_tokens: int, value: int) -> torch.Tensor:
    return torch.cat((tensor.new_full((tensor.shape[0], num_tokens), value), tensor), dim=1)
