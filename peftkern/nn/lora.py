"""LoRALinear: a frozen linear layer with a trained low-rank update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from peftkern.nn.nf4 import NF4Linear, dense_weight_of, is_bitsandbytes_4bit
from peftkern.ops.lora_matmul import lora_matmul
from peftkern.ops.nf4 import NF4Weight

_MERGE_ELEMENTS = 1 << 24  # float64 elements held at once while merging: 128 MiB


class LoRALinear(nn.Module):
    """y = x @ weight.T + bias + scaling * (dropout(x) @ lora_A.T) @ lora_B.T, computed by `peftkern.lora_matmul`.

    lora_A [rank, in] starts Kaiming-uniform with a = sqrt(5), lora_B [out, rank] at zero, so a new layer computes what
    its base computes. Both are float32 over a half-precision base, as the optimizer wants them; `to(dtype)` converts
    them. The base is frozen; its bias may be unfrozen and then gets its gradient.

    Args:
        base_layer: nn.Linear, NF4Linear, transformers' Conv1D, or bitsandbytes' Linear4bit in nf4, which becomes an
            NF4Linear over the same bytes. It is taken over, not copied.
        rank: r, any positive integer.
        lora_alpha: scaling is lora_alpha / rank, or lora_alpha / sqrt(rank) with `use_rslora`.
        dropout: share of x's elements that the update drops while training, in [0, 1).
        use_rslora: see lora_alpha.

    Attributes:
        scaling: a float, read on every call.
        enabled: False turns the update off.
        merged: whether the update is in the base's weight now; see `merge`.

    Raises:
        TypeError: a base that is none of these.
        ValueError: a bad rank, lora_alpha or dropout.

    Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """

    base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int = 16,
        lora_alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(type(self).__name__, rank, lora_alpha, dropout)
        if is_bitsandbytes_4bit(base_layer):
            base_layer = NF4Linear.from_bitsandbytes(base_layer)
        if isinstance(base_layer, NF4Linear):
            shape, device, dtype = base_layer.nf4.shape, base_layer.packed.device, base_layer.weight_dtype
            self.fan_in_fan_out = base_layer.fan_in_fan_out
        else:
            weight, self.fan_in_fan_out = dense_weight_of(base_layer, type(self).__name__)
            shape, device, dtype = weight.shape, weight.device, weight.dtype
        self.out_features, self.in_features = shape
        self.rank, self.lora_alpha, self.use_rslora = rank, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = float(dropout)
        self.enabled = True
        # Of a merged layer: the dense weight from before, on the CPU, or the NF4Linear. A tuple, so that the module
        # is not registered as a child.
        self._backup: tuple[torch.Tensor | NF4Linear, ...] = ()
        self.base_layer = base_layer.requires_grad_(False)
        factory: dict[str, Any] = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **factory))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draws lora_A anew and zeroes lora_B: the update is zero again."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def merged(self) -> bool:
        """Whether the update is in the base's weight."""
        return bool(self._backup)

    @property
    def weight(self) -> torch.Tensor | NF4Weight:
        """The base's weight as it is stored."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias [out]."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [*, in] -> [*, out] in x's dtype, or autocast's."""
        base = self.base_layer
        if self._backup or not self.enabled:
            return base(x)
        nf4 = isinstance(base, NF4Linear)
        weight = base.nf4 if nf4 else base.weight
        if self.fan_in_fan_out and not nf4:
            weight = weight.T
        compute_dtype = base.compute_dtype if nf4 else None
        y = lora_matmul(
            x if compute_dtype is None else x.to(compute_dtype),
            weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            bias=base.bias,
            dropout_p=self.dropout,
            training=self.training,
        )
        return y if compute_dtype is None else y.to(x.dtype)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """weight + scaling * lora_B @ lora_A as a dense tensor [out, in], computed in float64 and rounded once.

        An NF4 base enters with the values its codes stand for, in float32. The layer is not changed.

        Args:
            dtype: of the result; None is the base's dtype, for NF4 the one before quantization.
        """
        if self._backup:
            raise ValueError(f"{type(self).__name__}: the layer is merged already; call unmerge() first")
        base = self.base_layer
        if isinstance(base, NF4Linear):
            weight, dtype = base.dequantize(torch.float32), dtype or base.weight_dtype
        else:
            weight, _ = dense_weight_of(base, type(self).__name__)
            dtype = dtype or weight.dtype
        # float64 leaves no rounding of its own and is out of reach of TF32 settings.
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        lora_A, lora_B = self.lora_A.to(wide), self.lora_B
        rows = max(1, _MERGE_ELEMENTS // max(1, self.in_features))
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            merged[part] = weight[part].to(wide).addmm_(lora_B[part].to(wide), lora_A, alpha=self.scaling)
        return merged

    def merge(self) -> None:
        """Puts the update into the base's weight, so that a forward costs no more than the base's. Twice is once.

        A dense base keeps its dtype; an NF4 base becomes dense in its dtype from before quantization, never NF4 again.
        Rounding loses bits that cannot be recomputed, so the weight from before is kept: a dense one on the CPU, where
        it costs no accelerator memory, an NF4 one where it is. The state dict of a merged layer is that of the
        unmerged one.
        """
        if self._backup:
            return
        weight = self.merged_weight()
        base = self.base_layer
        if isinstance(base, NF4Linear):
            self._backup = (base,)
            self.base_layer = dense_linear(weight, base.bias, fan_in_fan_out=False)
            return
        # A new parameter instead of a write into the old one: the old one may be tied to an embedding.
        self._backup = (base.weight.detach().to("cpu", copy=True),)
        base.weight = nn.Parameter(weight.T.contiguous() if self.fan_in_fan_out else weight, requires_grad=False)

    def unmerge(self) -> None:
        """Restores the base from before `merge`, bit for bit (cast, if the layer was cast in between)."""
        if not self._backup:
            return
        (backup,) = self._backup
        weight = self.base_layer.weight
        if isinstance(backup, NF4Linear):
            backup.bias = None  # the dense stand-in carried it, through moves and casts
            backup.to(device=weight.device, dtype=weight.dtype)
            backup.bias = self.base_layer.bias
            self.base_layer = backup
        else:
            restored = backup.to(device=weight.device, dtype=weight.dtype)
            self.base_layer.weight = nn.Parameter(restored, requires_grad=False)
        self._backup = ()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As nn.Module's. A merged layer gives the weights from before the merge, so loading cannot add it twice."""
        result = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self._backup:
            (backup,) = self._backup
            key = f"{prefix}base_layer.weight"
            weight = result.pop(key)
            if isinstance(backup, NF4Linear):
                kept = backup.state_dict(prefix=f"{prefix}base_layer.")
                result.update({k: v.to(weight.device) for k, v in kept.items() if k.startswith(key)})
            else:
                result[key] = backup.to(device=weight.device, dtype=weight.dtype)
        return result

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        self.unmerge()  # what is loaded is an unmerged layer
        super()._load_from_state_dict(state_dict, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, dropout={self.dropout:g}, "
            f"enabled={self.enabled}, merged={self.merged}"
        )


def dense_linear(weight: torch.Tensor, bias: nn.Parameter | None, fan_in_fan_out: bool) -> nn.Module:
    """A frozen nn.Linear over `weight` [N, K], or transformers' Conv1D over its transpose; shares the bias.

    The bias comes in the weight's dtype.
    """
    layer: nn.Module
    if fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(weight.shape[0], weight.shape[1])
        weight = weight.T.contiguous()
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None and bias.dtype != weight.dtype:
        bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    layer.bias = bias  # type: ignore[assignment]
    return layer


def _check_arguments(who: str, rank: int, lora_alpha: float, dropout: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"{who}: rank must be a positive integer, got {rank!r}; 8 to 64 is usual")
    if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"{who}: lora_alpha must be a finite number, got {lora_alpha!r}; twice the rank is usual")
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be a number in [0, 1), got {dropout!r}; 0.05 or 0.1 is usual")
