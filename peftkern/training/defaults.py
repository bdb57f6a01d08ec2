"""What a person need not set: learning rates by method and model size, the method's config, one-line warnings."""

from __future__ import annotations

import re
from typing import Any

from peftkern.training.settings import TrainSettings

# Peak learning rates, for base models of up to so many parameters. LoRA's follow the field's guides; full fine-tuning's
# are the usual ones of instruction tuning; the rest keep their papers' ratio to full.
# The first row is for toys like the shipped base, from one sweep of every method on it (220 steps of 4 x 256 tokens;
# improvement of the held-out loss in nats): full 1e-4 1.479, 2e-4 1.530, 3e-4 1.525, 4e-4 1.506; LoRA 1e-3 1.434,
# 2e-3 1.477, 3e-3 1.461; QLoRA 2e-3 1.470, 3e-3 1.453; adapter 2e-3 1.428, 3e-3 1.451, 5e-3 1.454; prompt tuning
# 1e-2 1.006, 3e-2 1.021, 6e-2 0.995; P-tuning v2 3e-2 1.125, 1e-1 1.232, 2e-1 1.245, 4e-1 1.191.
_RATES: tuple[tuple[float, dict[str, float]], ...] = (
    (5e7, {"full": 2e-4, "lora": 2e-3, "adapter": 5e-3, "prompt": 3e-2, "ptuning_v2": 2e-1}),
    (1e9, {"full": 1e-4, "lora": 1e-3, "adapter": 1e-3, "prompt": 3e-2, "ptuning_v2": 1e-2}),
    (5e9, {"full": 3e-5, "lora": 2e-4, "adapter": 3e-4, "prompt": 3e-2, "ptuning_v2": 5e-3}),
    (30e9, {"full": 2e-5, "lora": 1e-4, "adapter": 1e-4, "prompt": 3e-2, "ptuning_v2": 5e-3}),
    (float("inf"), {"full": 1e-5, "lora": 5e-5, "adapter": 5e-5, "prompt": 3e-2, "ptuning_v2": 5e-3}),
)

_WORDS = ("minimal", "recommended", "full", "all-linear")


def default_learning_rate(method: str, parameters: int) -> float:
    """The peak learning rate for `method` on a base model of so many parameters."""
    rates = next(rates for limit, rates in _RATES if parameters < limit)
    return rates["lora" if method == "qlora" else method]


def method_config(method: str, settings: TrainSettings, options: dict[str, Any] | None = None) -> Any:
    """The method's config from the settings, `options` (any of its fields) winning; None for full fine-tuning.

    Raises:
        ValueError: an option the method's config does not have, or a value it refuses.
    """
    if method == "full":
        if options:
            raise ValueError(f"--method-options {', '.join(options)}: full fine-tuning has none")
        return None
    from peftkern.nn.config import MethodConfig

    values: dict[str, Any] = {}
    if method in ("lora", "qlora"):
        alpha = 2 * settings.rank if settings.lora_alpha is None else settings.lora_alpha
        values = {"r": settings.rank, "lora_alpha": alpha, "lora_dropout": settings.lora_dropout}
    elif method == "adapter":
        values = {"adapter_dim": settings.adapter_dim}
    else:
        values = {"num_tokens": settings.num_tokens}
    if method in ("lora", "qlora"):
        values["target_modules"] = _targets(settings.target_modules or ["all-linear"])
    elif method == "adapter" and settings.target_modules:
        values["target_modules"] = settings.target_modules
    return MethodConfig.from_dict({"method": method, **values, **(options or {})})


def _targets(entries: list[str]) -> str | list[str]:
    """A lone preset, "all-linear" or regular expression as the string that the configs take; names as a list."""
    word = entries[0]
    return word if len(entries) == 1 and (word in _WORDS or re.search(r"[^\w.-]", word)) else entries


def warnings_for(
    method: str,
    config: Any,
    learning_rate: float,
    parameters: int,
    warmup_ratio: float,
    targets: list[str],
    attention: list[str],
) -> list[str]:
    """One line for each classic mistake.

    Args:
        method, config: as trained.
        learning_rate: peak.
        parameters: of the base model.
        warmup_ratio: share of the steps.
        targets: names of the modules that got a LoRA update.
        attention: names of the base's attention projections; empty when unknown.
    """
    lines = []
    full = default_learning_rate("full", parameters)
    usual = default_learning_rate(method, parameters)
    if method in ("lora", "qlora"):
        if config.r < 8:
            lines.append(f"rank {config.r} is low; below 8, LoRA usually learns less than full fine-tuning")
        if attention and not set(targets) & set(attention):
            lines.append("no attention projection is a target; add q_proj and v_proj unless you mean it")
        if learning_rate <= full and learning_rate < usual:
            lines.append(
                f"learning rate {learning_rate:g} is one for full fine-tuning; LoRA usually wants about {usual:g} here"
            )
    if method == "full" and learning_rate > 5 * full:
        lines.append(
            f"learning rate {learning_rate:g} is high for full fine-tuning; about {full:g} is usual at this size"
        )
    if warmup_ratio == 0:
        lines.append("no warm-up: the first steps run at the full learning rate; --warmup-ratio 0.03 is usual")
    return lines
