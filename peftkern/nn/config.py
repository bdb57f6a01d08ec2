"""The methods' configs: dataclasses with the field's names, loadable from a dict or a YAML file.

Every value is checked when the config is made; an error names the class, the field, the rule, the value and the cure.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

C = TypeVar("C", bound="MethodConfig")

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
BIASES = ("none", "all", "lora_only")
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
PROMPT_INITS = ("vocab", "text", "random")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What people write for a field when they come from another library or from the paper.
_SYNONYMS = {
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "lora_modules": "target_modules",
    "num_virtual_tokens": "num_tokens",
    "prompt_length": "num_tokens",
    "adapter_size": "adapter_dim",
    "bottleneck": "adapter_dim",
    "prefix_projection": "projection",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_use_double_quant": "double_quant",
}


@dataclass
class MethodConfig:
    """What every method's config shares. `method` names the method; it is not a field."""

    method: ClassVar[str] = ""

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """A config from a plain dict.

        Args:
            values: field names to values. A "method" key must agree with the class; on `MethodConfig` itself it picks
                the class.

        Raises:
            TypeError: values is not a dict.
            ValueError: an unknown field (its near misses are named), an unknown method, or a bad value.
        """
        if not isinstance(values, dict):
            raise TypeError(f"{cls.__name__}: expected a mapping of fields to values, got {type(values).__name__}")
        values = dict(values)
        method = values.pop("method", cls.method or None)
        if not cls.method:
            chosen = METHODS.get(method) if isinstance(method, str) else None
            if chosen is None:
                raise ValueError(f"MethodConfig: method must be one of {sorted(METHODS)}, got {method!r}")
            return chosen.from_dict(values)  # type: ignore[return-value]
        if method != cls.method:
            raise ValueError(f"{cls.__name__}: method must be {cls.method!r} here, got {method!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{cls.__name__}: unknown field {name!r}; {_near_fields(name, known)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """A config from a YAML file that holds one mapping; see `from_dict`.

        Raises:
            ValueError: no such file, not YAML, not a mapping, an unknown field or a bad value.
            ImportError: PyYAML is missing.
        """
        try:
            import yaml
        except ImportError as error:
            raise ImportError(f'{cls.__name__}.from_yaml needs PyYAML; pip install "peftkern[cli]"') from error
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"{cls.__name__}: cannot read {path}: {reason}; give the path of a YAML file") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{cls.__name__}: {path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: {path} must hold a mapping of fields to values, such as 'r: 16'")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The method and every field as plain YAML and JSON values; `MethodConfig.from_dict` takes it back."""
        values: dict[str, Any] = {"method": self.method}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            values[f.name] = copy.copy(value)
        return values

    def _fail(self, name: str, rule: str, cure: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {name} must be {rule}, got {getattr(self, name)!r}; {cure}")

    def _check_positive(self, name: str, cure: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._fail(name, "a positive integer", cure)

    def _check_number(self, name: str, cure: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
            raise self._fail(name, "a finite number", cure)

    def _check_dropout(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise self._fail(name, "a number in [0, 1)", "0.05 or 0.1 is usual")

    def _check_choice(self, name: str, choices: tuple) -> None:
        value = getattr(self, name)
        if value not in choices or isinstance(value, bool):
            raise self._fail(name, f"one of {choices}", "pick one of them")

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise self._fail(name, "true or false", "write it without quotes")

    def _check_names(self, name: str, *, string: bool, optional: bool) -> None:
        """A non-empty list of strings, a string where `string`, None where `optional`. Tuples and sets become lists."""
        value = getattr(self, name)
        if isinstance(value, (tuple, set, frozenset)):
            value = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
            setattr(self, name, value)
        if (value is None and optional) or (string and isinstance(value, str) and value):
            return
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            rule = "a list of module names" + (" or a string" if string else "")
            raise self._fail(name, rule, 'such as ["q_proj", "v_proj"]')

    def _check_pattern(self, name: str, types: Any, kind: str) -> None:
        value = getattr(self, name)
        if value is None:
            setattr(self, name, {})
            return
        if not isinstance(value, dict) or not all(
            isinstance(k, str) and isinstance(v, types) and not isinstance(v, bool) and v > 0 for k, v in value.items()
        ):
            raise self._fail(name, f"a mapping of module names to {kind}", "such as {'layers.0.q_proj': 32}")


@dataclass
class LoRAConfig(MethodConfig):
    """LoRA (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        r: rank of the update; 8 to 64 is usual.
        lora_alpha: the update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`); 2 r is usual.
        lora_dropout: probability of zeroing an input element of the low-rank branch while training.
        target_modules: which linear layers get an update: a list of name suffixes, a regular expression that matches
            whole names, "all-linear" (all but the output head), or a preset: "minimal" (query, value), "recommended"
            (all of attention), "full" (attention and MLP).
        exclude_modules: suffixes or a regular expression of layers to leave out again.
        bias: which biases train besides: "none", "all", or "lora_only" (those of the adapted layers).
        modules_to_save: name suffixes of modules trained in full and saved with the adapter, such as a new head.
        use_rslora: scale by lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        rank_pattern, alpha_pattern: name suffixes or regular expressions to an r or lora_alpha of their own.

    Raises:
        ValueError: naming the field.
    """

    method: ClassVar[str] = "lora"

    r: int = 16
    lora_alpha: int | float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "recommended"
    exclude_modules: str | list[str] | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_positive("r", "8 to 64 is usual")
        self._check_number("lora_alpha", "twice r is usual")
        self._check_dropout("lora_dropout")
        self._check_names("target_modules", string=True, optional=False)
        self._check_names("exclude_modules", string=True, optional=True)
        self._check_choice("bias", BIASES)
        self._check_names("modules_to_save", string=False, optional=True)
        self._check_bool("use_rslora")
        self._check_pattern("rank_pattern", (int,), "positive integers")
        self._check_pattern("alpha_pattern", (int, float), "positive numbers")


@dataclass
class QLoRAConfig(LoRAConfig):
    """QLoRA (Dettmers et al. 2023, arXiv:2305.14314): LoRA over a base whose linear layers are all stored in NF4.

    Every linear layer but the output head is quantized; `target_modules` only says which of them get an update.

    Attributes:
        blocksize: elements per scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits too.
        compute_dtype: "float32", "float16", "bfloat16" or a torch.dtype in which the quantized layers compute; None
            means the dtype of their input.

    Raises:
        ValueError: naming the field.
    """

    method: ClassVar[str] = "qlora"

    target_modules: str | list[str] = "all-linear"
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("blocksize", BLOCKSIZES)
        self._check_bool("double_quant")
        if isinstance(self.compute_dtype, str):
            self.compute_dtype = DTYPES.get(self.compute_dtype.removeprefix("torch."), self.compute_dtype)
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES.values():
            raise self._fail("compute_dtype", f"one of {tuple(DTYPES)} or null", "bfloat16 is usual on a GPU")


@dataclass
class AdapterConfig(MethodConfig):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751).

    Attributes:
        adapter_dim: width of the bottleneck.
        hidden_act: "gelu", "gelu_tanh", "relu" or "silu".
        adapter_dropout: dropout inside the bottleneck while training.
        target_modules: the sublayers that get one: "attention", "mlp", or names of modules; see `placement`.
        exclude_modules: suffixes or a regular expression of modules to leave out again.
        placement: "houlsby" (after the sublayers in target_modules), "pfeiffer" (after the MLP only, Pfeiffer et al.
            2021, arXiv:2005.00247), or "parallel" (beside the sublayer, He et al. 2022, arXiv:2110.04366).
        scaling: factor on the bottleneck's output before it joins the residual.
        modules_to_save: name suffixes of modules trained in full and saved with the adapter.

    Raises:
        ValueError: naming the field.
    """

    method: ClassVar[str] = "adapter"

    adapter_dim: int = 64
    hidden_act: str = "gelu"
    adapter_dropout: float = 0.1
    target_modules: str | list[str] = field(default_factory=lambda: ["attention", "mlp"])
    exclude_modules: str | list[str] | None = None
    placement: str = "houlsby"
    scaling: float = 1.0
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        self._check_positive("adapter_dim", "16 to 256 is usual")
        self._check_choice("hidden_act", ACTIVATIONS)
        self._check_dropout("adapter_dropout")
        self._check_names("target_modules", string=True, optional=False)
        self._check_names("exclude_modules", string=True, optional=True)
        self._check_choice("placement", PLACEMENTS)
        self._check_number("scaling", "1.0 is usual, 4.0 for parallel adapters")
        self._check_names("modules_to_save", string=False, optional=True)


@dataclass
class PromptTuningConfig(MethodConfig):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained embeddings before the text's own.

    Attributes:
        num_tokens: how many.
        init: where they start: "vocab" (embeddings of random tokens of the vocabulary), "text" (those of `init_text`,
            repeated or cut to num_tokens) or "random".
        init_text: the text for init="text".

    Raises:
        ValueError: naming the field.
    """

    method: ClassVar[str] = "prompt"

    num_tokens: int = 20
    init: str = "vocab"
    init_text: str | None = None

    def __post_init__(self) -> None:
        self._check_positive("num_tokens", "20 to 100 is usual")
        self._check_choice("init", PROMPT_INITS)
        if self.init_text is not None and (not isinstance(self.init_text, str) or not self.init_text.strip()):
            raise self._fail("init_text", "a text", "leave it out unless init is 'text'")
        if (self.init == "text") != (self.init_text is not None):
            raise self._fail("init_text", "given exactly when init is 'text'", f"init is {self.init!r}")


@dataclass
class PTuningV2Config(MethodConfig):
    """P-tuning v2 (Liu et al. 2021, arXiv:2110.07602): trained keys and values at every layer.

    Attributes:
        num_tokens: prefix length.
        projection: compute the prefix with a two-layer tanh MLP from num_tokens embeddings while training.
        projection_dim: width of that MLP.
        dropout: on the prefix while training.

    Raises:
        ValueError: naming the field.
    """

    method: ClassVar[str] = "ptuning_v2"

    num_tokens: int = 20
    projection: bool = False
    projection_dim: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_positive("num_tokens", "20 to 128 is usual")
        self._check_bool("projection")
        self._check_positive("projection_dim", "512 is usual")
        self._check_dropout("dropout")


METHODS: dict[str, type[MethodConfig]] = {
    config.method: config for config in (LoRAConfig, QLoRAConfig, AdapterConfig, PromptTuningConfig, PTuningV2Config)
}


def _near_fields(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    synonym = _SYNONYMS.get(name)
    if synonym in known and synonym not in near:
        near.insert(0, synonym)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"the fields are {', '.join(known)}"
