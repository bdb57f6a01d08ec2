"""Settings of the training verbs: one dataclass per verb is the source of its flags, its YAML keys and their help."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from peftkern.training.errors import UserError

S = TypeVar("S", bound="TrainSettings")

METHODS = ("full", "lora", "qlora", "adapter", "prompt", "ptuning_v2")
OPTIMIZERS = ("adamw8bit", "paged_adamw8bit", "adamw")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def about(help: str, *, metavar: str | None = None, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a setting's flag shows of it; `choices` are also enforced."""
    return {"help": help, "metavar": metavar, "choices": choices}


def setting(default: Any, help: str, *, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field of a plain type, with what its flag shows."""
    return field(default=default, metadata=about(help, metavar=metavar, choices=choices))


@dataclass
class TrainSettings:
    """What both training verbs take. Lengths are in tokens, steps in optimizer updates."""

    model: str | None = setting(None, "Directory with a Transformers model, or its name on the hub.", metavar="DIR|ID")
    data: str | None = setting(None, "Training data: .jsonl, .json, .txt or .parquet.", metavar="FILE")
    eval_data: str | None = setting(None, "Held-out data; otherwise a part of --data is held out.", metavar="FILE")
    eval_fraction: float = setting(0.1, "Share of --data held out when there is no --eval-data.")
    text_field: str | None = setting(None, 'Field with the text; default "text", or chat "messages" where present.')
    output: str | None = setting(None, "Directory for the results.", metavar="DIR")
    max_length: int | None = setting(
        None,
        "Block length; texts are packed into blocks, an end-of-text token between them. "
        "[default: 512, or what fits the model]",
    )
    batch_size: int = setting(8, "Blocks per step and device.")
    gradient_accumulation: int = setting(1, "Batches per optimizer step.")
    epochs: float = setting(1.0, "Passes over the data; --max-steps overrides it.")
    max_steps: int | None = setting(None, "Optimizer steps.")
    warmup_ratio: float = setting(0.03, "Share of the steps that warm up; the learning rate then falls as a cosine.")
    weight_decay: float = setting(0.0, "Decoupled weight decay.")
    max_grad_norm: float = setting(1.0, "Gradient norm at which gradients are clipped; 0 never clips.")
    optimizer: str = setting("adamw8bit", "Optimizer.", choices=OPTIMIZERS)
    dtype: str = setting("auto", "Compute dtype; auto is bfloat16 on GPUs that have it, else float32.", choices=DTYPES)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward: less memory, more time.")
    seed: int = setting(42, "Seed of initialisation, data order, dropout and samples.")
    rank: int = setting(16, "LoRA and QLoRA: rank.")
    lora_alpha: float | None = setting(None, "LoRA and QLoRA: scaling numerator; default 2 * rank.")
    lora_dropout: float = setting(0.0, "LoRA and QLoRA: dropout.")
    target_modules: list[str] | None = field(
        default=None,
        metadata=about(
            "LoRA, QLoRA, adapters: minimal, recommended, full, all-linear, names or a regular expression; repeatable. "
            "[default: all-linear; adapters: attention and mlp]"
        ),
    )
    adapter_dim: int = setting(64, "Adapters: width of the bottleneck.")
    num_tokens: int = setting(20, "Prompt tuning and P-tuning v2: virtual tokens.")
    prompt: str | None = setting(None, "Start of the sample; default the first words of the held-out text.")
    sample_tokens: int = setting(60, "Tokens to sample before and after; 0 for no samples.")
    overwrite: bool = setting(False, "Replace the results of an earlier run in --output.")

    def validate(self) -> None:
        """Raises UserError for a missing or impossible value, before anything is loaded."""
        for name in ("model", "data"):
            if not getattr(self, name):
                raise UserError(f"{flag(name)} is missing; give it as a flag or as '{name}:' in the --config file")
        for name in ("batch_size", "gradient_accumulation", "rank", "adapter_dim", "num_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("max_length", self.max_length is None or self.max_length >= 2, "at least 2")
        self._require("eval_fraction", 0 < self.eval_fraction < 1, "between 0 and 1")
        self._require("epochs", self.epochs > 0, "positive")
        self._require("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1")
        self._require("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)")
        for name in ("weight_decay", "max_grad_norm", "sample_tokens"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{flag(name)} must be {rule}, got {getattr(self, name)}")


@dataclass
class FinetuneSettings(TrainSettings):
    """`peftkern finetune`."""

    method: str = setting("lora", "What to train.", choices=METHODS)
    learning_rate: float | None = setting(None, "Peak learning rate; default by method and model size.")
    method_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=about(
            "Any other field of the method's config, such as use_rslora=true; repeatable.", metavar="FIELD=VALUE"
        ),
    )
    save_steps: int = setting(500, "Steps between checkpoints; 0 keeps none but that of Ctrl-C.")
    save_total_limit: int = setting(2, "Checkpoints to keep.")
    logging_steps: int = setting(10, "Steps between log lines.")
    resume: bool = setting(False, "Go on from the last checkpoint in --output.")

    def validate(self) -> None:
        """Raises UserError for a missing or impossible value, before anything is loaded."""
        super().validate()
        self._require("learning_rate", self.learning_rate is None or self.learning_rate > 0, "positive")
        for name in ("save_total_limit", "logging_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("save_steps", self.save_steps >= 0, "0 or more")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; --resume goes on, --overwrite starts anew")


@dataclass
class CompareSettings(TrainSettings):
    """`peftkern compare`."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata=about("Methods to run, repeatable; full is always run. [default: all]", choices=METHODS),
    )
    learning_rates: dict[str, float] = field(
        default_factory=dict,
        metadata=about("Learning rate of a method, such as lora=2e-3; repeatable.", metavar="METHOD=RATE"),
    )

    def validate(self) -> None:
        """Raises UserError for a missing or impossible value, before anything is loaded."""
        super().validate()
        for method, rate in self.learning_rates.items():
            if method not in METHODS:
                raise UserError(f"--learning-rates: {method!r} is no method; they are {', '.join(METHODS)}")
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not rate > 0:
                raise UserError(f"--learning-rates: the rate of {method} must be a positive number, got {rate!r}")


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def gather(cls: type[TrainSettings], config: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What a person set: a YAML file's values, the command line's over them.

    Args:
        cls: the verb's settings.
        config: path of a YAML mapping of settings, or None. Keys are written with `_` or `-`.
        given: what the command line set; None and empty collections mean "not given". Mappings (`method_options`) are
            merged key by key, everything else replaces.

    Raises:
        UserError: an unreadable file, an unknown key (its near misses are named), or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in (_read_yaml(config) if config else {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(sorted(known))}"
            raise UserError(f"{config}: unknown key {str(key)!r}; {hint}")
        if value is not None:
            values[name] = _coerce(value, types[name], f"{config}: {key}")
    for name, value in given.items():
        if value is not None and value != [] and value != {}:
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    for name, value in values.items():
        choices = known[name].metadata["choices"]
        for item in (value if isinstance(value, list) else [value]) if choices else ():
            if item not in choices:
                raise UserError(f"{flag(name)} must be one of {', '.join(choices)}, got {item!r}")
    return values


def build(cls: type[S], values: dict[str, Any]) -> S:
    """Validated settings: the defaults with `values` over them. Raises UserError."""
    settings = cls(**values)
    settings.validate()
    return settings


def parse_mapping(items: list[str] | None, name: str) -> dict[str, Any]:
    """`["a=1", "b=true"]` as `{"a": 1, "b": True}`; values are YAML. Raises UserError."""
    import yaml

    mapping = {}
    for item in items or ():
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"{flag(name)} takes NAME=VALUE, got {item!r}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{flag(name)}: cannot read the value of {key}: {value!r}") from None
        mapping[key.strip().replace("-", "_")] = _number(parsed)
    return mapping


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read --config {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"--config {path} must hold a mapping such as 'method: lora'")
    return values or {}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string, because it has no dot."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _coerce(value: Any, annotation: Any, where: str) -> Any:
    """A YAML value as the setting's type; ints pass as floats, scalars as one-element lists."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    kind = annotation if str(annotation).startswith(("list", "dict")) else kinds[0]
    if str(kind).startswith("list"):
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) for item in items):
            return items
        raise UserError(f"{where} must be a list of names, got {value!r}")
    if str(kind).startswith("dict"):
        if isinstance(value, dict):
            return {str(key): _number(item) for key, item in value.items()}
        raise UserError(f"{where} must be a mapping, got {value!r}")
    if kind in (int, float):
        number = _number(value)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or (kind is int and number != int(number)):
            raise UserError(f"{where} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
        return kind(number)
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{where} must be true or false, got {value!r}")
    if kind is str and not isinstance(value, (str, int, float)):
        raise UserError(f"{where} must be a text, got {value!r}")
    return str(value) if kind is str else value
