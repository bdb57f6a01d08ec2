"""Adapter: a bottleneck beside or behind a frozen sublayer, and `apply_adapter`, which puts one into every layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from peftkern.nn.targets import match_modules, near
from peftkern.ops import bottleneck

ATTENTION, MLP = "attention", "mlp"
ADAPTER_NAME = "adapter"  # of the submodule that a sublayer gets

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
INITS = ("bert", "mam", "houlsby")

# What Transformers calls the sublayers of a layer. A layer may have several of the first kind (cross-attention).
_ATTENTION_NAMES = (
    "self_attn",
    "self_attention",
    "attn",
    "attention",
    "SelfAttention",
    "encoder_attn",
    "cross_attn",
    "crossattention",
    "EncDecAttention",
)
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "DenseReluDense")
# Towers beside the language model of a multimodal one: other widths, and not what a text task tunes.
_OTHER_TOWERS = ("vision", "visual", "audio", "image")
# What DDP, torch.compile and checkpoint wrappers put into the names of the modules they wrap.
_WRAPPER_PARTS = frozenset(("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


class Adapter(nn.Module):
    """y = residual + scaling * (dropout(act(x @ down.T + down_bias)) @ up.T + up_bias), by `peftkern.bottleneck`.

    Args:
        hidden_size: H, of x and y.
        adapter_size: width of the bottleneck, 16 to 256 is usual.
        dropout: share of the bottleneck's activations dropped while training, in [0, 1).
        hidden_act: "gelu" (exact), "gelu_tanh", "relu" or "silu"; "gelu_new" and "swish" are synonyms.
        init_weights: where it starts. "bert": both weights N(0, 0.02), biases 0, which is near the identity. "houlsby":
            N(0, 0.01) cut at two standard deviations, nearer. "mam": down Kaiming-uniform with a = sqrt(5), up 0, the
            identity exactly.
        scaling: factor on what the bottleneck adds; 4.0 is usual beside an MLP.
        device, dtype: of the parameters; any float dtype goes with any dtype of x.

    Attributes:
        down, up: nn.Linear [adapter_size, H] and [H, adapter_size], whose names are the state dict's.
        enabled: False makes it pass its residual through.

    Raises:
        ValueError: naming the argument.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; beside a sublayer: He et al. 2021, arXiv:2110.04366.
    """

    def __init__(
        self,
        hidden_size: int,
        adapter_size: int = 64,
        dropout: float = 0.1,
        hidden_act: str = "gelu",
        init_weights: str = "bert",
        scaling: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("adapter_size", adapter_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"Adapter: {name} must be a positive integer, got {value!r}; 64 is a usual bottleneck")
        if not 0 <= dropout < 1:
            raise ValueError(f"Adapter: dropout must be in [0, 1), got {dropout!r}; 0.1 is usual")
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"Adapter: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {hidden_act!r}")
        if init_weights not in INITS:
            raise ValueError(f"Adapter: init_weights must be one of {', '.join(INITS)}, got {init_weights!r}")
        if not abs(scaling) < float("inf"):
            raise ValueError(f"Adapter: scaling must be finite, got {scaling!r}; 1.0 is usual")
        self.hidden_size, self.adapter_size = hidden_size, adapter_size
        self.dropout, self.scaling = float(dropout), float(scaling)
        self.hidden_act, self.init_weights = ACTIVATIONS[hidden_act], init_weights
        self.enabled = True
        self.down = nn.Linear(hidden_size, adapter_size, device=device, dtype=dtype)
        self.up = nn.Linear(adapter_size, hidden_size, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew, as `init_weights` says, and zeroes the biases."""
        if self.init_weights == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
            nn.init.normal_(self.up.weight, std=0.02)
        elif self.init_weights == "houlsby":
            nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.trunc_normal_(self.up.weight, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [*, H] of any float dtype -> [*, H] in the residual's dtype or wider; `residual` None means x itself."""
        if not self.enabled:
            return x if residual is None else residual
        return bottleneck(
            x,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            activation=self.hidden_act,
            dropout_p=self.dropout,
            training=self.training,
            scaling=self.scaling,
            residual=residual,
        )

    def extra_repr(self) -> str:
        """What `print` shows besides the layers."""
        return f"hidden_act={self.hidden_act}, dropout={self.dropout}, scaling={self.scaling}"


class AfterSublayer:
    """Forward hook of a sublayer: its output, or the first of its outputs, goes through the adapter.

    The hooks of this package are objects of module-level classes, so that a model with them copies and pickles.
    """

    def __call__(self, sublayer: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (sublayer.adapter(output[0]), *output[1:])
        return sublayer.adapter(output)


class BesideSublayer:
    """Forward hook (with kwargs) of a sublayer: the adapter reads the sublayer's input and adds to its output."""

    def __call__(self, sublayer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (sublayer.adapter(x, residual=output[0]), *output[1:])
        return sublayer.adapter(x, residual=output)


class Site(NamedTuple):
    """Where an adapter goes: a module's name, and whether the module's input and output are the sublayer's."""

    name: str
    whole: bool


def apply_adapter(model: nn.Module, config: Any) -> nn.Module:
    """Freezes `model` and puts a trainable Adapter at each sublayer that `config` (AdapterConfig) means. In place.

    The adapter becomes the sublayer's submodule "adapter", called by a forward hook; the base's own state-dict keys
    stay as they are. Placements: "houlsby" and "pfeiffer" transform the sublayer's output before the residual is added
    to it, after attention and MLP or after the MLP only; "parallel" reads the sublayer's input and adds to its output.
    Where a layer adds the residual inside the sublayer (BERT, BLOOM, MPT) or computes the MLP inline (OPT), the adapter
    sits on the last linear layer before that addition; parallel placement is then refused.

    Args:
        model: a Transformers model, or any model whose layers lie in an nn.ModuleList and call their sublayers by the
            usual names; else give `target_modules` as module names.
        config: adapter_dim, hidden_act, adapter_dropout, target_modules, placement, scaling, exclude_modules.

    Raises:
        ValueError: nothing matches, the placement cannot be had there, or the model has adapters already.
    """
    sites = adapter_sites(model, config)
    for site in sites:
        if hasattr(model.get_submodule(site.name), ADAPTER_NAME):
            raise ValueError(f"apply_adapter: {site.name} has an adapter already; start from the base model")
    widths = [_width(model, site.name, model.get_submodule(site.name)) for site in sites]  # raises before any change
    parallel = config.placement == "parallel"
    init = getattr(config, "init_weights", None) or ("mam" if parallel else "bert")
    model.requires_grad_(False)
    for site, width in zip(sites, widths):
        sublayer = model.get_submodule(site.name)
        weight = next((p for p in sublayer.parameters() if p.is_floating_point()), None)
        adapter = Adapter(
            width,
            config.adapter_dim,
            config.adapter_dropout,
            config.hidden_act,
            init,
            config.scaling,
            device=None if weight is None else weight.device,
            dtype=torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32),
        )
        sublayer.add_module(ADAPTER_NAME, adapter.train(sublayer.training))
        if parallel:
            sublayer.register_forward_hook(BesideSublayer(), with_kwargs=True)
        else:
            sublayer.register_forward_hook(AfterSublayer())
    return model


def adapter_sites(model: nn.Module, config: Any) -> list[Site]:
    """Where `apply_adapter` would put adapters, in the model's order. Changes nothing.

    Raises:
        ValueError: see `apply_adapter`.
    """
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    kinds = {target for target in targets if target in (ATTENTION, MLP)}
    names = [target for target in targets if target not in kinds]
    if config.placement == "pfeiffer":
        if kinds == {ATTENTION} and not names:
            raise ValueError(
                "apply_adapter: target_modules must contain 'mlp' for placement 'pfeiffer', which adapts no attention; "
                "use 'houlsby'"
            )
        kinds.discard(ATTENTION)
    found = {site.name: site for kind in sorted(kinds) for site in _known_sites(model, kind)}
    if names:
        # A lone string is a regular expression, as everywhere.
        query = names[0] if isinstance(config.target_modules, str) else names
        for name in match_modules(model, query, None, kinds=(nn.Module,)):
            found.setdefault(name, Site(name, True))
    if excluded := getattr(config, "exclude_modules", None):
        # Every match of the exclusion inside the model, so that "layers.0" leaves out what lies in it.
        out = match_modules(model, excluded, None, kinds=(nn.Module,))
        found = {name: s for name, s in found.items() if not any(name == o or name.startswith(f"{o}.") for o in out)}
        if not found:
            raise ValueError(f"exclude_modules: {excluded!r} leaves nothing of target_modules {targets}; shorten it")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    sites = sorted(found.values(), key=lambda site: order[site.name])
    if config.placement == "parallel":
        for site in sites:
            if not site.whole:
                raise ValueError(
                    f"apply_adapter: placement 'parallel' needs the sublayer around {site.name} as a module that does "
                    f"not add its residual itself, which {type(model).__name__} has not; use 'houlsby' or 'pfeiffer'"
                )
    return sites


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors, detached, by state-dict key: "model.layers.0.mlp.adapter.down.weight" and so on.

    Keys are the unwrapped model's, also when `model` is compiled, distributed or checkpoint-wrapped.

    Raises:
        ValueError: the model has no adapters.
    """
    return {name: parameter.detach() for name, parameter in _adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies tensors as `adapter_tensors` gives them into the model's adapters, converting dtype and device.

    Raises:
        ValueError: a key is missing or unknown, or a shape differs; nothing is changed then.
    """
    parameters = _adapter_parameters(model)
    missing = [name for name in parameters if name not in tensors]
    unknown = [name for name in tensors if name not in parameters]
    if missing:
        raise ValueError(
            f"load_adapter_tensors: {len(missing)} of {len(parameters)} tensors are missing, the first is {missing[0]}"
            f"{near(missing[0], list(tensors)) if tensors else ''}; apply the config that the file was saved with"
        )
    if unknown:
        raise ValueError(
            f"load_adapter_tensors: {len(unknown)} tensors belong to no adapter of this model, the first is "
            f"{unknown[0]}; apply the config that the file was saved with"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"load_adapter_tensors: {name} must be {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}; "
                "check adapter_dim and the base model"
            )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            plain = ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)
            found |= {f"{plain}.{key}": parameter for key, parameter in module.named_parameters()}
    if not found:
        raise ValueError(f"adapter_tensors: {type(model).__name__} has no adapters; call apply_adapter first")
    return found


def _known_sites(model: nn.Module, kind: str) -> list[Site]:
    """The sublayers of one kind in every layer, by the names that Transformers gives them."""
    layers = list(_layers(model))
    sites = [site for name, layer in layers for site in _layer_sites(name, layer, kind)]
    if not sites:
        children = sorted({child for _, layer in layers for child, _ in layer.named_children()})
        has = f"its layers have {', '.join(children[:12])}" if children else "no nn.ModuleList holds layers"
        raise ValueError(
            f"apply_adapter: {type(model).__name__} has no {kind} sublayer of a known name ({has}); "
            "list module names in target_modules"
        )
    return sites


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of module lists, outside other towers than the language model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(word in name.lower() for word in _OTHER_TOWERS):
            yield from ((f"{name}.{child}" if name else child, layer) for child, layer in module.named_children())


def _layer_sites(name: str, layer: nn.Module, kind: str) -> Iterator[Site]:
    children = dict(layer.named_children())
    if "attention" in children and "intermediate" in children and "output" in children:  # the BERT family
        for child in ("attention", "crossattention") if kind == ATTENTION else ("",):
            path = f"{child}.output.dense".lstrip(".")
            if child in ("", *children) and _has_submodule(layer, path):
                yield Site(f"{name}.{path}", False)
        return
    for child in _ATTENTION_NAMES if kind == ATTENTION else _MLP_NAMES:
        sublayer = children.get(child)
        if sublayer is None:
            continue
        if "residual" not in inspect.signature(sublayer.forward).parameters:
            yield Site(f"{name}.{child}", True)
            continue
        # It adds the residual itself: only the linear layer before that can be followed.
        linear = [inner for inner, module in sublayer.named_children() if isinstance(module, nn.Linear)]
        if getattr(sublayer, "slow_but_exact", False) or not linear:
            raise ValueError(
                f"apply_adapter: {name}.{child} adds its residual itself, behind no linear layer that is called; "
                "set slow_but_exact to false in the model's config"
            )
        yield Site(f"{name}.{child}.{linear[-1]}", False)
    if kind == MLP and "fc1" in children and "fc2" in children:
        yield Site(f"{name}.fc2", False)


def _has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _width(model: nn.Module, name: str, sublayer: nn.Module) -> int:
    """The size of the sublayer's output: that of a linear layer, else the model's hidden size."""
    for attribute in ("out_features", "nf"):  # nn.Linear and NF4Linear; Transformers' Conv1D
        if isinstance(width := getattr(sublayer, attribute, None), int):
            return width
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    linear = [m for m in sublayer.modules() if isinstance(getattr(m, "out_features", None), int)]
    if linear:  # a plain module without a config: its last layer maps back to the residual's width
        return int(linear[-1].out_features)  # type: ignore[arg-type]
    raise ValueError(f"apply_adapter: the width of {name} is unknown; name a linear layer inside it in target_modules")
