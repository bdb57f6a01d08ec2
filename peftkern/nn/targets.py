"""Which modules of a model a config means: suffix lists, regular expressions, "all-linear" and presets.

Nothing is left out silently: an entry that selects no module raises and names what comes close.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch.nn as nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

ALL_LINEAR = "all-linear"
PRESETS = ("minimal", "recommended", "full")
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")


class Family(NamedTuple):
    """One naming scheme of transformer layers: query and value, all of attention, and the MLP's alternatives."""

    query_value: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]


# Tried in this order; the first whose attention names are all there is the model's. MLP names are alternatives
# (gated or not, dense or fused) of which at least one must be there.
FAMILIES = (
    # Llama, Mistral, Mixtral, Qwen, Gemma, StarCoder2, StableLM, OLMo, Cohere, SmolLM
    Family(
        ("q_proj", "v_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "c_fc", "c_proj"),
    ),
    # Phi-3, GLM-4: one fused projection
    Family(("qkv_proj",), ("qkv_proj", "o_proj"), ("gate_up_proj", "gate_proj", "up_proj", "down_proj")),
    # OPT, GPT-J, GPT-Neo, BART, Whisper, CLIP
    Family(
        ("q_proj", "v_proj"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj"),
    ),
    Family(("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2")),  # Phi-1, Phi-2
    # GPT-2, GPT-BigCode
    Family(("c_attn",), ("c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
    # GPT-NeoX, Pythia
    Family(
        ("query_key_value",),
        ("query_key_value", "attention.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    # Falcon, BLOOM, ChatGLM
    Family(
        ("query_key_value",),
        ("query_key_value", "self_attention.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    # BERT, RoBERTa, ELECTRA, ViT
    Family(
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    # DeBERTa-v2 and -v3
    Family(
        ("query_proj", "value_proj"),
        ("query_proj", "key_proj", "value_proj", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    Family(("q", "v"), ("q", "k", "v", "o"), ("wi", "wi_0", "wi_1", "wo")),  # T5
    Family(("q_lin", "v_lin"), ("q_lin", "k_lin", "v_lin", "out_lin"), ("lin1", "lin2")),  # DistilBERT
    Family(("Wqkv",), ("Wqkv", "out_proj"), ("up_proj", "down_proj", "fc1", "fc2")),  # MPT
    Family(("Wqkv",), ("Wqkv", "attn.Wo"), ("mlp.Wi", "mlp.Wo")),  # ModernBERT
    Family(("in_proj",), ("in_proj", "attention.output.dense"), ("intermediate.dense", "output.dense")),  # DeBERTa
)


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """The classes that LoRA adapts: nn.Linear (bitsandbytes' Linear4bit is one), NF4Linear, transformers' Conv1D."""
    from peftkern.nn.nf4 import NF4Linear

    # A model can only hold a Conv1D if its module is loaded already; importing transformers here would cost seconds.
    module = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(module, "Conv1D", None)
    return (nn.Linear, NF4Linear) if conv1d is None else (nn.Linear, NF4Linear, conv1d)


def match_modules(
    model: nn.Module,
    target_modules: str | list[str],
    exclude_modules: str | list[str] | None = None,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> list[str]:
    """The full names of the modules that `target_modules` selects, in the model's order.

    Args:
        model: any module.
        target_modules: a list of full names or dotted suffixes ("q_proj", "attn.c_proj"); or a string: a preset of
            `PRESETS`, "all-linear" (every `kinds` module but the output head), or a regular expression that must match
            a whole name. PEFT's rules, except that nothing may match nothing.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        kinds: classes a module must be of.

    Returns:
        Names, each once.

    Raises:
        ValueError: an entry, the regular expression or the preset selects nothing (near misses are named), an entry
            names a layer of another class, or everything is excluded.
    """
    names = [name for name, module in model.named_modules() if name and _adaptable(module, kinds)]
    if not names:
        raise ValueError(f"target_modules: {type(model).__name__} holds no {_kind_names(kinds)} module to adapt")
    if isinstance(target_modules, str):
        chosen = _match_string(model, target_modules, names)
    else:
        chosen = _match_suffixes(model, target_modules, names, kinds)
    if exclude_modules:
        excluded = _match_excluded(exclude_modules, names)
        chosen = [name for name in chosen if name not in excluded]
        if not chosen:
            raise ValueError(
                f"exclude_modules: {exclude_modules!r} leaves nothing of target_modules {target_modules!r}; shorten it"
            )
    return chosen


def matches_suffix(name: str, suffixes: Iterable[str]) -> bool:
    """Whether `name` is one of the suffixes or ends with one after a dot."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def match_pattern(patterns: Iterable[str], name: str) -> str | None:
    """The first key of a rank or alpha pattern that fits: a regular expression for a name or a dotted suffix of it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def check_patterns(argument: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raises ValueError for a key of rank_pattern or alpha_pattern that is no regular expression or fits no name."""
    for key in patterns:
        _compile(argument, key)
        if not any(match_pattern([key], name) for name in names):
            raise ValueError(f"{argument}: {key!r} fits none of the {len(names)} adapted modules{near(key, names)}")


def output_head_names(model: nn.Module) -> set[str]:
    """Names of the linear layers that map to the vocabulary or the classes, which "all-linear" leaves alone.

    They are the model's `get_output_embeddings()`, linear layers tied to its input embeddings, and top-level layers
    with a head's usual name.
    """
    heads = [_call(model, "get_output_embeddings")]
    embedding = getattr(_call(model, "get_input_embeddings"), "weight", None)
    found = set()
    for name, module in model.named_modules():
        tied = embedding is not None and isinstance(module, nn.Linear) and module.weight is embedding
        if name in HEAD_NAMES or tied or any(module is head for head in heads if head is not None):
            found.add(name)
            found.update(f"{name}.{inner}" for inner, _ in module.named_modules() if inner)
    return found


def near(entry: str, names: list[str]) -> str:
    """The end of an error message: the names that come close to `entry`, else what there is to choose from."""
    suffixes = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    close = difflib.get_close_matches(entry.rsplit(".", 1)[-1], suffixes, n=3, cutoff=0.5)
    if not close:
        close = difflib.get_close_matches(entry, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; there are {', '.join(suffixes[:12])}{', ...' if len(suffixes) > 12 else ''}"


def _match_string(model: nn.Module, target: str, names: list[str]) -> list[str]:
    if target.lower() == ALL_LINEAR:
        heads = output_head_names(model)
        chosen = [name for name in names if name not in heads]
        if not chosen:
            raise ValueError(f"target_modules: 'all-linear' finds only the output head {names}; name it if you mean it")
        return chosen
    if target in PRESETS:
        entries = preset_suffixes(names, target)
        return [name for name in names if matches_suffix(name, entries)]
    pattern = _compile("target_modules", target)
    chosen = [name for name in names if pattern.fullmatch(name)]
    if not chosen:
        hint = near(target, names + list(PRESETS) + [ALL_LINEAR])
        raise ValueError(f"target_modules: the regular expression {target!r} matches no whole module name{hint}")
    return chosen


def preset_suffixes(names: list[str], preset: str) -> list[str]:
    """The name suffixes that a preset means for a model whose linear layers are called `names`.

    Raises:
        ValueError: the names follow no known scheme, or "full" finds no MLP.
    """

    def present(suffix: str) -> bool:
        return any(matches_suffix(name, (suffix,)) for name in names)

    family = next((f for f in FAMILIES if all(present(suffix) for suffix in f.attention)), None)
    if family is None:
        found = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
        raise ValueError(
            f"target_modules: preset {preset!r} does not know this model's layer names; list those you want of {found}"
        )
    if preset == "minimal":
        return list(family.query_value)
    if preset == "recommended":
        return list(family.attention)
    mlp = [suffix for suffix in family.mlp if present(suffix)]
    if not mlp:
        raise ValueError(
            "target_modules: preset 'full' finds no linear MLP layer here (experts fused into one tensor have none); "
            "use 'recommended'"
        )
    return [*family.attention, *mlp]


def _match_suffixes(
    model: nn.Module, entries: list[str], names: list[str], kinds: tuple[type[nn.Module], ...]
) -> list[str]:
    others = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and not _adaptable(module, kinds) and next(module.parameters(recurse=False), None) is not None
    }
    for entry in entries:
        other = next((name for name in others if matches_suffix(name, (entry,))), None)
        if other is not None:
            raise ValueError(
                f"target_modules: {entry!r} selects {other}, a {others[other]}; this method adapts {_kind_names(kinds)}"
            )
        if not any(matches_suffix(name, (entry,)) for name in names):
            raise ValueError(f"target_modules: {entry!r} matches no {_kind_names(kinds)} module{near(entry, names)}")
    return [name for name in names if matches_suffix(name, entries)]


def _match_excluded(exclude: str | list[str], names: list[str]) -> set[str]:
    if isinstance(exclude, str):
        pattern = _compile("exclude_modules", exclude)
        excluded = {name for name in names if pattern.fullmatch(name)}
        if not excluded:
            raise ValueError(f"exclude_modules: {exclude!r} matches no whole module name{near(exclude, names)}")
        return excluded
    for entry in exclude:
        if not any(matches_suffix(name, (entry,)) for name in names):
            raise ValueError(f"exclude_modules: {entry!r} matches no module{near(entry, names)}")
    return {name for name in names if matches_suffix(name, exclude)}


def _compile(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None


def _call(model: nn.Module, method: str) -> nn.Module | None:
    """`model.method()`, or None where the model has no such method or does not implement it."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None


def _adaptable(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it, so an update there would do nothing.
    return isinstance(module, kinds) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _kind_names(kinds: tuple[type[nn.Module], ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)
