"""lora_qkv and lora_mlp name the projection and the argument that they cannot take, before anything runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lora_projections import projection

from peftkern import lora_mlp, lora_qkv, quantize_nf4

K, I = 40, 56  # noqa: E741

# Changes to one projection [N, 40], and what the message says after its name.
BAD = [
    ({"weight": lambda t: t.t()}, "x .* and weight .* must share K.*is weight transposed"),
    ({"weight": lambda t: t[0]}, "weight must be a matrix"),
    ({"weight": lambda t: t[:0]}, "weight is empty.*FSDP"),
    ({"weight": lambda t: t.to("meta")}, "x is on cpu but weight is on meta; .*to_empty"),
    ({"weight": lambda t: t.to(torch.int8)}, "weight must be float32.*quantize_nf4"),
    ({"weight": lambda t: t.bfloat16()}, "x is torch.float32 but weight is torch.bfloat16; cast"),
    ({"weight": lambda t: t.clone().requires_grad_()}, r"weight is frozen.*requires_grad_\(False\)"),
    ({"weight": "q"}, "weight must be a torch.Tensor or an NF4Weight, got str"),
    ({"weight": lambda t: quantize_nf4(t).with_tensors(quantize_nf4(t[:1]).tensors())}, "weight: .*packed must hold"),
    ({"lora_A": lambda t: t.detach().int()}, "lora_A must be float32"),
    ({"lora_A": lambda t: t.to("meta")}, "lora_A is on meta but weight is on cpu"),
    ({"lora_A": lambda t: t.t()}, r"lora_A must be \[r, K\] with K = 40.*transposed"),
    ({"lora_B": lambda t: t.t()}, r"lora_B must be \[N, r\] with N = 56.*transposed"),
    ({"lora_B": lambda t: t[:, :4]}, r"lora_A \[r, K\] and lora_B \[N, r\] must share the rank"),
    ({"lora_A": lambda t: t[:0], "lora_B": lambda t: t[:, :0]}, "the rank must be at least 1"),
    ({"lora_A": None}, "lora_A is None; give lora_A and lora_B both"),
    ({"lora_B": None}, "lora_B is None; give lora_A and lora_B both"),
    ({"lora_B": 3}, "lora_B must be a torch.Tensor, got int"),
    ({"bias": lambda t: t[:3]}, r"bias must have shape \[56\]"),
    ({"bias": 0.0}, "bias must be a torch.Tensor, got float"),
    ({"scaling": math.nan}, "scaling must be finite, got nan"),
    ({"scaling": torch.ones(1)}, "scaling must be a number or a 0-dim tensor"),
]


def changed(p, changes):
    return replace(p, **{key: new(getattr(p, key)) if callable(new) else new for key, new in changes.items()})


def raises(message):
    return pytest.raises((ValueError, TypeError), match=message)


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_projection_of_qkv_is_named(changes, message):
    good = projection(I, K, 5)
    with raises(rf"^lora_qkv: projections\[1\]: {message}") as error:
        lora_qkv(torch.randn(6, K), [good, changed(good, changes), good])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), BAD)
@pytest.mark.parametrize("name", ["gate", "up"])
def test_a_bad_gate_or_up_is_named(name, changes, message):
    args = {"gate": projection(I, K, 5), "up": projection(I, K, 5), "down": projection(K, I, 5)}
    with raises(f"^lora_mlp: {name}: {message}") as error:
        lora_mlp(torch.randn(6, K), **args | {name: changed(args[name], changes)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("down", "message"),
    [
        (
            projection(I, K, 5),
            r"down: its input \[\*, K\] and weight \[N, K\] must share K, got \(6, 56\) and \(56, 40\)",
        ),
        (changed(projection(K, I, 5), {"lora_A": lambda t: t.t()}), r"down: lora_A must be \[r, K\] with K = 56"),
        (changed(projection(K, I, 5), {"weight": lambda t: t.half()}), "down: x is torch.float32 but weight is"),
        ("down", "down must be a LoRAProjection, got str"),
    ],
)
def test_a_bad_down_is_named(down, message):
    with raises(f"^lora_mlp: {message}"):
        lora_mlp(torch.randn(6, K), projection(I, K, 5), projection(I, K, 5), down)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: lora_qkv(x, p), "projections must be a list or tuple of LoRAProjection, got LoRAProjection"),
        (lambda x, p: lora_qkv(x, iter([p])), "projections must be a list or tuple"),
        (lambda x, p: lora_qkv(x, []), "at least one LoRAProjection"),
        (lambda x, p: lora_qkv(x, [p, p.weight]), r"projections\[1\] must be a LoRAProjection, got Tensor"),
        (lambda x, p: lora_qkv(x[:, :9], [p]), r"projections\[0\]: x \[\*, K\] and weight \[N, K\] must share K"),
        (
            lambda x, p: lora_qkv(x.int(), [p]),
            r"projections\[0\]: x must be float32, float16 or bfloat16, got torch.int32",
        ),
        (lambda x, p: lora_qkv(None, [p]), r"projections\[0\]: x must be a torch.Tensor, got NoneType"),
        (lambda x, p: lora_qkv(x, [p], dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (lambda x, p: lora_mlp(x, p, p, projection(K, I, 5), dropout_p=-0.1), r"dropout_p must be in \[0, 1\)"),
        (
            lambda x, p: lora_mlp(x, p, p, projection(K, I, 5), activation="relu"),
            "activation must be one of silu, gelu",
        ),
        (lambda x, p: lora_mlp(x, p, projection(9, K, 5), projection(K, I, 5)), r"one shape \[I, K\], got \(56, 40\)"),
    ],
)
def test_other_bad_input_is_named(call, message):
    with raises(message) as error:
        call(torch.randn(6, K), projection(I, K, 5))
    assert "\n" not in str(error.value)


def test_a_weight_that_requires_grad_is_fine_for_inference():
    with torch.no_grad():
        lora_qkv(torch.randn(6, K), [changed(projection(I, K, 5), {"weight": lambda t: t.clone().requires_grad_()})])
