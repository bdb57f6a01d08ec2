"""LoRA matmul names what it cannot take, and how to cure it, before anything runs."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern import lora_matmul, quantize_nf4

N, K, R = 24, 40, 5


def bad(**changes):
    """The arguments of a sound call, but for `changes`: name -> value, or a function of the sound value."""
    args = {
        "x": torch.randn(6, K),
        "weight": torch.randn(N, K),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
        "scaling": 2.0,
        "bias": torch.randn(N),
    }
    return args | {name: new(args[name]) if callable(new) else new for name, new in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda t: t[:, :9]}, r"x \[\*, K\] and weight \[N, K\] must share K.*transposed"),
        ({"x": torch.tensor(1.0)}, "must share K"),
        ({"weight": lambda t: t.t()}, "is weight transposed"),
        ({"weight": lambda t: t[0]}, "weight must be a matrix"),
        ({"weight": lambda t: t[:0]}, "weight is empty.*FSDP"),
        ({"weight": lambda t: t.new_empty(0)}, "weight is empty.*FSDP"),
        ({"weight": lambda t: t.to("meta")}, "x is on cpu but weight is on meta; .*to_empty"),
        ({"weight": lambda t: t.to(torch.int8)}, "weight must be float32.*quantize_nf4"),
        ({"weight": lambda t: t.bfloat16()}, "x is torch.float32 but weight is torch.bfloat16; cast"),
        ({"weight": lambda t: t.clone().requires_grad_()}, "weight is frozen.*requires_grad_\\(False\\)"),
        ({"weight": "q"}, "weight must be a torch.Tensor or an NF4Weight, got str"),
        ({"weight": lambda t: quantize_nf4(t).with_tensors((*quantize_nf4(t[:1]).tensors(),))}, "packed must hold"),
        ({"x": lambda t: t.int()}, "x must be float32, float16 or bfloat16, got torch.int32; cast"),
        ({"lora_A": lambda t: t.to(torch.int32)}, "lora_A must be float32"),
        ({"lora_A": lambda t: t.to("meta")}, "lora_A is on meta but weight is on cpu"),
        ({"lora_A": lambda t: t.t()}, r"lora_A must be \[r, K\] with K = 40.*transposed"),
        ({"lora_B": lambda t: t.t()}, r"lora_B must be \[N, r\] with N = 24.*transposed"),
        ({"lora_B": lambda t: t[:, :4]}, "must share the rank"),
        ({"lora_A": lambda t: t[:0], "lora_B": lambda t: t[:, :0]}, "rank must be at least 1"),
        ({"lora_A": None}, "lora_A must be a torch.Tensor, got NoneType"),
        ({"bias": lambda t: t[:3]}, r"bias must have shape \[24\]"),
        ({"scaling": math.nan}, "scaling must be finite, got nan"),
        ({"scaling": math.inf}, "scaling must be finite"),
        ({"scaling": torch.ones(1)}, "scaling must be a number or a 0-dim tensor"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        lora_matmul(**bad(**changes))
    assert "\n" not in str(error.value)


def test_a_weight_that_requires_grad_is_fine_for_inference():
    with torch.no_grad():
        lora_matmul(**bad(weight=lambda t: t.clone().requires_grad_()))


def test_a_sharded_weight_is_named():
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def shard(t):
            return distribute_tensor(t.detach(), mesh, [Shard(0)])

        with pytest.raises(ValueError, match=r"weight is a sharded DTensor; .*full_tensor\(\)"):
            lora_matmul(**bad(weight=shard))
        with pytest.raises(ValueError, match="lora_A is a sharded DTensor"):
            lora_matmul(**bad(lora_A=shard))
    finally:
        dist.destroy_process_group()
