"""NF4Linear: bitsandbytes' state dict, moves and casts that never touch a stored bit, autograd, compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from peftkern import NF4Linear, dequantize_nf4, nf4_matmul, quantize_nf4
from peftkern.testing.numerics import assert_within

PIECES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")


def stored(layer):
    """Every stored tensor as (dtype, shape, bytes)."""
    return {
        name: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
        for name in PIECES
        if (t := getattr(layer, name)) is not None
    }


def make(device="cpu", bias=True, dtype=torch.float32, shape=(48, 80), **options):
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(shape[1], shape[0], bias=bias, device=device, dtype=dtype), **options)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_the_matmul_with_the_dequantized_weight(device, dtype, double_quant):
    layer = make(device, dtype=dtype, double_quant=double_quant)
    x = torch.randn(2, 5, 80, device=device, dtype=dtype)
    weight = layer.dequantize(torch.float64)
    truth = x.double() @ weight.T + layer.bias.double()
    eager = nn.functional.linear(x, layer.dequantize(dtype), layer.bias)
    assert_within(layer(x), eager, truth)
    assert layer.dequantize().dtype == dtype
    assert torch.equal(layer.dequantize(), quantize_nf4_weight_of(device, dtype, double_quant).dequantize())


def quantize_nf4_weight_of(device, dtype, double_quant):
    torch.manual_seed(0)
    return quantize_nf4(nn.Linear(80, 48, device=device, dtype=dtype).weight, 64, double_quant)


def test_gradients_reach_x_and_the_bias(device):
    layer = make(device)
    x = torch.randn(3, 80, device=device, requires_grad=True)
    dy = torch.randn(3, 48, device=device)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0), rtol=1e-5, atol=1e-5)


def test_the_weight_is_no_parameter():
    layer = make()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert [name for name, _ in make(bias=False).named_parameters()] == []
    layer.requires_grad_(True)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    torch.optim.AdamW(layer.parameters())


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.type(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to(next(m.buffers()).new_zeros(1, dtype=torch.float16)), torch.float16),
    ],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_casts_change_the_decode_dtype_and_no_stored_bit(device, cast, dtype, double_quant):
    layer = make(device, double_quant=double_quant)
    before, values = stored(layer), layer.dequantize(torch.float32)
    cast(nn.Sequential(layer))
    assert stored(layer) == before
    assert layer.weight_dtype == dtype
    assert layer.dequantize().dtype == dtype
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.dequantize(torch.float32), values)


def test_moves_keep_every_bit(device):
    layer = make()
    before = stored(layer)
    layer.to(device).to("cpu").to(device, torch.bfloat16)
    assert stored(layer) == before
    assert {buffer.device.type for buffer in layer.buffers()} == {device.type}
    layer.share_memory() if device.type == "cpu" else None
    assert stored(layer) == before


def test_an_error_in_a_move_loses_nothing():
    layer = make()
    before = stored(layer)

    def fails(tensor):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        layer._apply(fails)
    assert stored(layer) == before


def test_copies_are_independent(device):
    layer = make(device, compute_dtype=torch.bfloat16)
    before = stored(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert stored(other) == before
        assert other.compute_dtype == torch.bfloat16
        other.packed.zero_()
        assert stored(layer) == before


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_round_trip(device, double_quant, assign):
    model = nn.Sequential(make(device, double_quant=double_quant, dtype=torch.bfloat16), nn.ReLU())
    state = model.state_dict(prefix="outer.")
    keys = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if double_quant else [])]
    expected = ["weight", "bias", *(f"weight.{k}" for k in [*keys, "quant_state.bitsandbytes__nf4"])]
    assert list(state) == [f"outer.0.{key}" for key in expected]
    other = nn.Module()
    other.outer = nn.Sequential(NF4Linear(80, 48, double_quant=double_quant, device=device), nn.ReLU())
    pieces = {name: getattr(other.outer[0], name) for name in ("packed", "absmax")}
    assert other.load_state_dict(state, assign=assign) == ([], [])
    assert stored(other.outer[0]) == stored(model[0])
    assert other.outer[0].weight_dtype == torch.bfloat16
    for name, piece in pieces.items():
        assert (getattr(other.outer[0], name).data_ptr() == piece.data_ptr()) is not assign


def test_strictness():
    state = make().state_dict()
    layer = NF4Linear(80, 48)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight.stranger"):
        layer.load_state_dict({**state, "weight.stranger": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": state["bias"]})
    assert layer.load_state_dict({"bias": state["bias"]}, strict=False).missing_keys == ["weight"]
    missing = {k: v for k, v in state.items() if k != "weight.absmax"}
    with pytest.raises(RuntimeError, match=r"'weight.absmax' is missing"):
        layer.load_state_dict(missing, strict=False)


BAD = {
    "fp4": (lambda: {k.replace("__nf4", "__fp4"): v for k, v in make().state_dict().items()}, "type is fp4"),
    "blocksize": (lambda: make(blocksize=128).state_dict(), "blocksize is 128 but this NF4Linear has 64"),
    "double_quant": (lambda: make(double_quant=False).state_dict(), "double_quant is False"),
    "shape": (
        lambda: make(shape=(80, 48), bias=False).state_dict() | {"bias": torch.zeros(48)},
        r"shape is \(80, 48\)",
    ),
    "dense shape": (lambda: nn.Linear(81, 48).state_dict(), "not a weight that bitsandbytes stored"),
    "int8": (
        lambda: {"weight": torch.zeros(48, 80, dtype=torch.int8), "bias": torch.zeros(48)},
        "not a weight that bitsandbytes stored",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(case):
    state, message = BAD[case]
    layer = NF4Linear(80, 48)
    before = stored(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state())
    assert stored(layer) == before


def test_a_checkpoints_own_scale_code_stays_in_its_layer(device):
    """The 8-bit code of the scales is honoured as stored, and one layer's does not leak into another's."""
    layer, other = make(device), make(device)
    before = stored(other)
    state = layer.state_dict()
    state["weight.nested_quant_map"] = state["weight.nested_quant_map"] * 0.5
    layer.load_state_dict(state)
    assert torch.equal(layer.nested_code, other.nested_code * 0.5)
    assert stored(other) == before == stored(make(device))


def test_a_dense_state_dict_is_quantized(device):
    dense = nn.Linear(80, 48, device=device)
    layer = NF4Linear(80, 48, device=device)
    layer.load_state_dict(dense.state_dict())
    assert stored(layer) == stored(NF4Linear.from_linear(dense))
    assert torch.equal(layer.bias, dense.bias)


def test_meta_construction_then_load(device):
    source = make(device)
    with torch.device("meta"):
        layer = NF4Linear(80, 48)
    assert all(t.is_meta for t in [*layer.buffers(), *layer.parameters()])
    assert list(layer.state_dict()) == list(source.state_dict())
    with pytest.warns(UserWarning, match="no-op"), pytest.raises(RuntimeError, match="assign=True"):
        layer.load_state_dict(source.state_dict())
    layer.load_state_dict(source.state_dict(), assign=True)
    assert stored(layer) == stored(source)
    empty = NF4Linear(80, 48, device="meta").to_empty(device=device)
    empty.load_state_dict(source.state_dict())
    assert stored(empty) == stored(source)


def test_bfloat16_as_default_dtype():
    """Scales and offset are float32 whatever the default dtype; bitsandbytes once rounded the offset."""
    state = make(dtype=torch.bfloat16).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = NF4Linear(80, 48)
        assert layer.nested_offset.dtype == torch.float32
        layer.load_state_dict(state)
        assert layer.bias.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert stored(layer) == stored(make(dtype=torch.bfloat16))


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_state_dict_both_ways(double_quant):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(128, 48, dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(128, 48, quant_type="nf4", compress_statistics=double_quant)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to(torch.bfloat16).to("cpu")
    state = theirs.state_dict()
    ours = NF4Linear(128, 48, double_quant=double_quant, dtype=torch.bfloat16)
    ours.load_state_dict(state)
    again = ours.state_dict()
    assert list(again) == list(state)
    for key in state:
        assert again[key].dtype == state[key].dtype, key
        assert torch.equal(again[key], state[key]), key
    assert stored(ours) == stored(NF4Linear.from_linear(dense, double_quant=double_quant))
    back = bnb.nn.Params4bit.from_prequantized(
        again["weight"], {k: v for k, v in again.items() if k.startswith("weight.")}, device="cpu"
    )
    assert torch.equal(bnb.functional.dequantize_4bit(back.data, back.quant_state), ours.dequantize())
    shared = NF4Linear.from_bitsandbytes(theirs)
    assert stored(shared) == stored(ours)
    assert shared.packed.data_ptr() == theirs.weight.data_ptr()
    assert shared.bias is theirs.bias


def test_bitsandbytes_layers_that_are_not_nf4():
    bnb = pytest.importorskip("bitsandbytes")
    for layer in (bnb.nn.Linear4bit(64, 64, quant_type="fp4"), bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")):
        with pytest.raises(ValueError, match="only nf4"):
            NF4Linear.from_bitsandbytes(layer)
    dense = bnb.nn.Linear4bit(64, 64, quant_type="nf4")  # not moved yet, so not quantized yet
    expected = quantize_nf4(dense.weight.data)
    assert torch.equal(NF4Linear.from_bitsandbytes(dense).packed, expected.packed)


def test_compute_dtype(device):
    layer = make(device, compute_dtype=torch.bfloat16)
    x = torch.randn(3, 80, device=device)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, nf4_matmul(x.bfloat16(), layer.nf4, layer.bias).float())


def test_autocast(device):
    layer = make(device)
    x = torch.randn(3, 80, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x)
        reference = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert y.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(device, use_reentrant):
    layer = make(device)
    x = torch.randn(3, 80, device=device, requires_grad=True)
    layer(x).square().sum().backward()
    want, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, want)


def test_compile_fullgraph(device):
    layer = make(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 80, device=device, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_a_new_layer_starts_as_nn_linear_does():
    torch.manual_seed(3)
    layer = NF4Linear(64, 32)
    torch.manual_seed(3)
    dense = nn.Linear(64, 32)
    assert stored(layer) == stored(NF4Linear.from_linear(dense))
    assert torch.equal(layer.bias, dense.bias)
    assert NF4Linear(64, 32, dtype=torch.bfloat16, bias=False).weight_dtype == torch.bfloat16


def test_weight_looks_like_a_weight():
    layer = make(dtype=torch.bfloat16)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (
        (48, 80),
        torch.bfloat16,
        layer.bias.device,
    )
    assert torch.equal(dequantize_nf4(layer.weight), layer.dequantize())
    assert "blocksize=64" in repr(layer)


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: NF4Linear(64, 64, blocksize=48), "blocksize must be one of"),
        (lambda: NF4Linear(-1, 64), "in_features must be"),
        (lambda: NF4Linear(64, 6.5), "out_features must be"),
        (lambda: NF4Linear(64, 64, dtype=torch.int8), "dtype must be float32"),
        (lambda: NF4Linear(64, 64, compute_dtype=torch.int8), "compute_dtype must be"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8, device="meta")), "meta device"),
        (lambda: NF4Linear.from_linear(nn.Conv2d(8, 8, 1)), "got Conv2d"),
    ],
)
def test_bad_arguments(make_layer, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_layer()
