"""NF4Linear for one token: one op and nothing else; and bitsandbytes' checkpoints, bit for bit on every device."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import NF4Linear, nf4_matmul
from peftkern.testing.numerics import assert_within

VIEWS = {"view", "_unsafe_view", "reshape", "expand", "slice", "detach", "alias"}


class Ops(TorchDispatchMode):
    """Names of the ops that run within, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def make(device, dtype=torch.bfloat16, shape=(48, 128), frozen=True, **options):
    dense = nn.Linear(shape[1], shape[0], device=device, dtype=dtype)
    return NF4Linear.from_linear(dense, **options).requires_grad_(not frozen)


@pytest.mark.parametrize("shape", [(128,), (1, 128), (1, 1, 128), (2, 3, 128)])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_frozen_layer_is_one_op(device, shape, compute_dtype):
    layer = make(device, compute_dtype=compute_dtype)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    for grad in (True, False):  # with gradients enabled nothing requires one all the same
        with torch.set_grad_enabled(grad), Ops() as ops:
            y = layer(x)
        assert ops.names == ["nf4_matmul"]
        assert y.shape == (*shape[:-1], 48)
        assert not y.requires_grad
        assert torch.equal(y, nf4_matmul(x, layer.nf4, layer.bias))


def test_gradients_and_inference_see_the_same_values(device):
    layer = make(device, frozen=False)
    x = torch.randn(3, 128, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
    y = layer(x)
    assert y.requires_grad  # the bias wants one
    assert torch.equal(y, expected)
    layer.requires_grad_(False)
    assert layer(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x.detach()), expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_strided_input(device, layout):
    layer = make(device, torch.float32)
    x = {
        "transposed": lambda: torch.randn(128, 5, device=device).t(),
        "sliced": lambda: torch.randn(5, 256, device=device)[:, ::2],
        "offset": lambda: torch.randn(5 * 128 + 1, device=device)[1:].view(5, 128),
    }[layout]()
    with torch.no_grad():
        truth = nn.functional.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
        assert_within(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias), truth)


def test_empty_input(device):
    layer = make(device)
    for shape in ((0, 128), (2, 0, 128)):
        assert layer(torch.empty(shape, device=device, dtype=torch.bfloat16)).shape == (*shape[:-1], 48)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 127), "must share K"),
        (torch.tensor(1.0), "must share K"),
        (torch.ones(2, 128, dtype=torch.int32), "x must be float32"),
        (torch.ones(2, 128, device="meta"), "x is on meta"),
    ],
)
def test_bad_input_is_named(device, x, message):
    x = x if x.is_meta else x.to(device)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        make(device)(x)


def test_autocast_applies_without_gradients(device):
    layer = make(device, torch.float32)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(torch.randn(1, 128, device=device)).dtype == torch.bfloat16


def test_compiles_without_gradients(device):
    layer = make(device, torch.float32)
    x = torch.randn(1, 128, device=device)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
    meta = layer.to("meta")
    assert meta(torch.empty(3, 128, device="meta")).shape == (3, 48)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_linear4bit_checkpoint_loads_bit_for_bit(device, dtype, double_quant):
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(128, 48, dtype=dtype)
    theirs = bnb.nn.Linear4bit(
        128, 48, compute_dtype=dtype, quant_type="nf4", compress_statistics=double_quant, device="meta"
    )
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant, module=theirs
    )
    theirs.bias = nn.Parameter(dense.bias.detach())
    theirs = theirs.to(device)
    state = theirs.state_dict()
    ours = NF4Linear(128, 48, double_quant=double_quant, dtype=dtype, device=device)
    ours.load_state_dict(state)
    quantized = theirs.weight.quant_state
    assert torch.equal(ours.packed, theirs.weight.data)
    assert torch.equal(ours.absmax, quantized.absmax)
    if double_quant:
        assert torch.equal(ours.nested_absmax, quantized.state2.absmax)
        assert torch.equal(ours.nested_code, quantized.state2.code)
        assert torch.equal(ours.nested_offset, quantized.offset)
    assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(theirs.weight.data, quantized))
    again = ours.state_dict()
    assert list(again) == list(state)
    for key, tensor in state.items():  # bitsandbytes keeps the quant_state's JSON on the CPU
        assert torch.equal(again[key].cpu(), tensor.cpu()), key
        assert again[key].dtype == tensor.dtype, key
    x = torch.randn(5, 128, device=device, dtype=dtype)
    with torch.no_grad():
        weight = ours.dequantize(torch.float64)
        truth = nn.functional.linear(x.double(), weight, theirs.bias.double())
        assert_within(ours(x), nn.functional.linear(x, ours.dequantize(), ours.bias), truth)
