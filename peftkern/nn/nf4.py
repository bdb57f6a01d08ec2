"""NF4Linear: a linear layer whose frozen weight is stored in NF4."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn

from peftkern.formats.nf4 import is_nf4_key, nf4_from_state_dict, nf4_state_dict
from peftkern.ops._autocast import autocast_dtype
from peftkern.ops.nf4 import NF4Weight, nf4_matmul, quantize_nf4
from peftkern.ops.nf4.settled import Settled
from peftkern.ops.nf4.weight import BLOCKSIZES, FLOAT_DTYPES, NESTED_BLOCKSIZE

_PIECES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")


class NF4Linear(nn.Module):
    """y = x @ weight.T + bias with the frozen weight in NF4: bitsandbytes.nn.Linear4bit's place, bytes and state dict.

    The bytes are buffers, not parameters, so optimizers and `requires_grad_` pass them by. Their values never change:
    `to(device)` moves them; `to(dtype)`, `half()` and the like convert the bias and set the dtype that `dequantize`
    returns, nothing else.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias [N], an ordinary nn.Parameter.
        blocksize: elements per scale, a power of two from 32 to 4096, over the flattened weight.
        double_quant: store the scales in 8 bits too.
        compute_dtype: the input is cast to it and the output back to the input's dtype. None: the input's dtype, or
            autocast's, as nn.Linear.
        device, dtype: of the bias, and the weight's dtype before quantization.

    A new layer holds nn.Linear's random initial weight, quantized; on the meta device nothing. `from_linear` quantizes
    a layer that is there; `load_state_dict` takes quantized keys (bit for bit) and a dense weight (quantizing it).

    Raises:
        ValueError: a bad size, blocksize or dtype; while loading, another quantization type, blocksize or shape.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        _check_arguments(in_features, out_features, blocksize, compute_dtype, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.double_quant, self.compute_dtype = blocksize, double_quant, compute_dtype
        self.weight_dtype = dtype
        self._settled = Settled()
        # The layer was a transformers Conv1D, whose weight is [in, out]; merging turns it back into one.
        self.fan_in_fan_out = False
        self._register(_empty_weight(out_features, in_features, dtype, blocksize, double_quant, device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Linear:
        """The quantized copy of a dense layer, on its device. The bias is shared with it, the weight is not.

        Args:
            linear: nn.Linear or transformers' Conv1D with a float32, float16 or bfloat16 weight; not changed.
            blocksize, double_quant, compute_dtype: as in the constructor.

        Raises:
            TypeError, ValueError: another kind of layer, another dtype, a layer on the meta device.
        """
        weight, transposed = dense_weight_of(linear, "NF4Linear.from_linear")
        if weight.is_meta:
            raise ValueError("NF4Linear.from_linear: linear is on the meta device; load its weights before quantizing")
        return cls.from_weight(
            quantize_nf4(weight, blocksize, double_quant),
            linear.bias,
            compute_dtype=compute_dtype,
            fan_in_fan_out=transposed,
        )

    @classmethod
    def from_weight(
        cls,
        q: NF4Weight,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
    ) -> NF4Linear:
        """A layer over a weight [N, K] that is quantized already; shares its memory and the bias."""
        q.check()
        if len(q.shape) != 2:
            raise ValueError(f"NF4Linear: the weight must be a matrix [N, K], got shape {tuple(q.shape)}")
        layer = cls(
            q.shape[1],
            q.shape[0],
            bias=False,
            blocksize=q.blocksize,
            double_quant=q.double_quant,
            compute_dtype=compute_dtype,
            device="meta",
            dtype=q.dtype,
        )
        layer._register(q)
        layer.bias = bias
        layer.fan_in_fan_out = fan_in_fan_out
        return layer

    @classmethod
    def from_bitsandbytes(cls, layer: Any) -> NF4Linear:
        """A bitsandbytes Linear4bit as an NF4Linear over the same bytes, its scales and bias shared, nothing copied.

        Raises:
            ValueError: an fp4 layer.
        """
        compute_dtype = getattr(layer, "compute_dtype", None)
        if getattr(layer.weight, "quant_state", None) is None:  # not yet moved to its device, so still dense
            if getattr(layer.weight, "quant_type", "nf4") != "nf4":
                raise ValueError(
                    f"NF4Linear: only nf4 is supported, the layer's quant_type is {layer.weight.quant_type}"
                )
            q = quantize_nf4(layer.weight.data, layer.weight.blocksize, layer.weight.compress_statistics)
        else:
            q = nf4_from_state_dict(layer.state_dict())
        return cls.from_weight(q, layer.bias, compute_dtype=compute_dtype)

    @property
    def nf4(self) -> NF4Weight:
        """The weight [N, K]; its tensors are this layer's buffers."""
        weight = NF4Weight(
            self.packed,
            self.absmax,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.blocksize,
            self.nested_absmax,
            self.nested_code,
            self.nested_offset,
        )
        if not torch.compiler.is_compiling():
            vars(weight)["settled"] = self._settled  # the layer remembers from call to call
        return weight

    @property
    def weight(self) -> NF4Weight:
        """The same as `nf4`: code that asks a layer for its weight's shape, dtype or device finds them."""
        return self.nf4

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [N, K]; dtype None is `weight_dtype`."""
        return self.nf4.dequantize(dtype)

    def reset_parameters(self) -> None:
        """Draws nn.Linear's initial weight and bias and quantizes the weight. Does nothing on the meta device."""
        if self.packed.is_meta:
            return
        bias = self.bias is not None
        dense = nn.Linear(self.in_features, self.out_features, bias, self.packed.device, self.weight_dtype)
        with torch.no_grad():
            if self.bias is not None:
                self.bias.copy_(dense.bias)
            self._copy(quantize_nf4(dense.weight, self.blocksize, self.double_quant))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [*, K] -> [*, N] in x's dtype (autocast's where it is on and compute_dtype is None)."""
        if self.compute_dtype is None:
            return self._matmul(x)
        return self._matmul(x.to(self.compute_dtype)).to(x.dtype)

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        tracked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if tracked or not self._is_plain(x):
            return nf4_matmul(x, self.nf4, bias)
        # Decoding one token, the host's time counts: the op alone, which checks its tensors itself.
        pieces = [self._buffers[name] for name in _PIECES]
        rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)
        settled = not torch.compiler.is_compiling() and rows.numel() > 0 and self._settled.check(pieces)
        y = torch.ops.peftkern.nf4_matmul(
            rows.contiguous(), *pieces, bias, self.blocksize, NESTED_BLOCKSIZE, self.out_features, settled
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether the op takes x as it is; `nf4_matmul` casts the others or says what is wrong with them."""
        packed = self._buffers["packed"]
        assert packed is not None
        return (
            x.dtype in FLOAT_DTYPES
            and x.device == packed.device
            and x.dim() > 0
            and x.shape[-1] == self.in_features
            and autocast_dtype(x) == x.dtype
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}, compute_dtype={self.compute_dtype}, "
            f"weight_dtype={self.weight_dtype}"
        )

    def _register(self, q: NF4Weight) -> None:
        # Not persistent: the state dict carries bitsandbytes' keys instead. The code book is a table that all weights
        # share, so each layer takes a copy that loading may overwrite.
        for name, tensor in zip(_PIECES, q.tensors()):
            own = tensor.clone() if name == "nested_code" and tensor is not None else tensor
            self.register_buffer(name, own, persistent=False)

    def _copy(self, q: NF4Weight) -> None:
        for name, tensor in zip(_PIECES, q.tensors()):
            if tensor is not None:
                getattr(self, name).copy_(tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.packed.device)
        pieces = {name: self._buffers.pop(name) for name in _PIECES}
        try:
            super()._apply(fn, recurse)
            pieces = {name: None if tensor is None else _move(fn, tensor) for name, tensor in pieces.items()}
            self.weight_dtype = fn(probe).dtype
        finally:
            self._buffers.update(pieces)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        tensors = nf4_state_dict(self.nf4)
        destination[prefix + "weight"] = tensors.pop("weight")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in tensors.items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        own = {key.removeprefix(prefix): key for key in state_dict if key.startswith(prefix)}
        own = {name: key for name, key in own.items() if is_nf4_key(name)}
        unexpected_keys.extend(key for key in unexpected if key not in own.values())
        if "weight" not in own:
            if strict:
                missing_keys.append(prefix + "weight")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            self._load_weight({name: state_dict[key] for name, key in own.items()}, assign)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def _load_weight(self, state: dict[str, torch.Tensor], assign: bool) -> None:
        weight = state["weight"]
        if self.packed.is_meta and not assign:
            raise ValueError(
                "NF4Linear is on the meta device; load with assign=True, or call to_empty(device=...) first"
            )
        if len(state) == 1 and weight.is_floating_point() and tuple(weight.shape) == self.nf4.shape:
            q = quantize_nf4(weight.detach(), self.blocksize, self.double_quant)
        else:
            q = nf4_from_state_dict(state)
        for name, got, want in (
            ("shape", tuple(q.shape), tuple(self.nf4.shape)),
            ("blocksize", q.blocksize, self.blocksize),
            ("double_quant", q.double_quant, self.double_quant),
        ):
            if got != want:
                raise ValueError(f"the stored {name} is {got} but this NF4Linear has {want}; construct it with {got}")
        self.weight_dtype = q.dtype
        if assign:
            self._register(q)
            return
        with torch.no_grad():
            self._copy(q)


def dense_weight_of(linear: Any, who: str) -> tuple[torch.Tensor, bool]:
    """The weight of nn.Linear or transformers' Conv1D as [N, K], a view, and whether it was stored transposed.

    Raises:
        TypeError: another kind of layer, or one whose weight is packed by some other library.
    """
    transposed = is_conv1d(linear)
    if not transposed and not isinstance(linear, nn.Linear):
        raise TypeError(
            f"{who}: base_layer must be nn.Linear, NF4Linear, bitsandbytes' Linear4bit or transformers' Conv1D, got "
            f"{type(linear).__name__}; other layers have no low-rank update here"
        )
    weight = linear.weight
    if weight.dtype not in (*FLOAT_DTYPES, torch.float64) or weight.dim() != 2:
        raise TypeError(
            f"{who}: base_layer is a {type(linear).__name__} whose weight is {weight.dtype} {tuple(weight.shape)}, "
            "packed by another library; load the model in bfloat16 or in bitsandbytes' nf4 instead"
        )
    return (weight.T if transposed else weight), transposed


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D (GPT-2), told without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_bitsandbytes_4bit(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' Linear4bit, told without importing bitsandbytes."""
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def _move(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """fn(tensor), except that a cast (half(), to(bfloat16)) only takes over the device: the stored bits stay."""
    new = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)


def _empty_weight(
    rows: int, columns: int, dtype: torch.dtype, blocksize: int, double_quant: bool, device: torch.device | str | None
) -> NF4Weight:
    """A weight of the right sizes without values."""
    numel = rows * columns
    blocks = -(-numel // blocksize)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    packed = empty((numel + 1) // 2, 1, dtype=torch.uint8)
    absmax = empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = (empty(-(-blocks // NESTED_BLOCKSIZE)), empty(256), empty()) if double_quant else (None, None, None)
    return NF4Weight(packed, absmax, torch.Size((rows, columns)), dtype, blocksize, *nested)


def _check_arguments(
    in_features: int, out_features: int, blocksize: int, compute_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"NF4Linear: {name} must be an integer of at least 0, got {size!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"NF4Linear: blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
        if value not in (*FLOAT_DTYPES, torch.float64) and (name == "dtype" or value is not None):
            raise ValueError(f"NF4Linear: {name} must be float32, float16 or bfloat16, got {value}")
