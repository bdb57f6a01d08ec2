"""Tiny, randomly initialised Transformers models, and what tests of methods that change a model's forward share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "bloom": {},
}


def tiny(kind: str, **overrides: Any) -> Any:
    """An AutoModelForCausalLM of this architecture in eval mode, weights large enough that everything matters."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind], **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def batch(device: torch.device | str = "cpu", length: int = 10) -> dict[str, torch.Tensor]:
    """Two texts, the second with three padding tokens on the right; labels as a collator makes them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {key: value.to(device) for key, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def gradients(model: Any, module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradients of the loss to `module`'s parameters in one vector; model in training mode, seed fixed."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    return torch.cat([p.grad.detach().flatten() for p in module.parameters() if p.requires_grad])


def checkpointed(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """Six greedy tokens with their logits."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
