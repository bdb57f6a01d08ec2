"""NF4 weights under bitsandbytes' keys."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern import quantize_nf4
from peftkern.formats import atomic_save_safetensors, load_safetensors, nf4_from_state_dict, nf4_state_dict

PIECES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")


def assert_same(a, b):
    for name in PIECES:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            assert torch.equal(x.cpu(), y.cpu()), name
    assert (a.shape, a.dtype, a.blocksize) == (b.shape, b.dtype, b.blocksize)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(40, 64), (7, 33), (1, 1), (300, 130)])
def test_round_trip_through_a_file(device, shape, double_quant, tmp_path):
    q = quantize_nf4(torch.randn(shape, device=device, dtype=torch.bfloat16), 64, double_quant)
    atomic_save_safetensors(nf4_state_dict(q, "model.layer.weight"), tmp_path / "q")
    assert_same(nf4_from_state_dict(load_safetensors(tmp_path / "q"), "model.layer.weight"), q)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_and_bytes_are_bitsandbytes(dtype, double_quant):
    bnb = pytest.importorskip("bitsandbytes")
    # Whole blocks per row: bitsandbytes 0.50.2's CPU dequantize is wrong where a block straddles two rows.
    weight = torch.randn(48, 128).to(dtype)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    q = nf4_from_state_dict(theirs)
    ours = nf4_state_dict(q)
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    assert torch.equal(q.dequantize(), bnb.functional.dequantize_4bit(packed, state))
    back = bnb.functional.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in ours.items() if k != "weight"}, device="cpu"
    )
    assert torch.equal(bnb.functional.dequantize_4bit(ours["weight"], back), q.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_other_quant_storage_is_the_same_bytes(storage):
    q = quantize_nf4(torch.randn(16, 64))
    state = nf4_state_dict(q)
    state["weight"] = state["weight"].view(-1).view(storage).view(-1, 1)
    assert_same(nf4_from_state_dict(state), q)


def test_the_offset_stays_float32_under_another_default_dtype():
    q = quantize_nf4(torch.randn(64, 64))
    state = nf4_state_dict(q)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same(nf4_from_state_dict(state), q)
    finally:
        torch.set_default_dtype(torch.float32)


def _edit(state, **changes):
    key = "weight.quant_state.bitsandbytes__nf4"
    fields = json.loads(bytes(state[key].tolist()))
    fields.update(changes)
    return {**state, key: torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)}


BAD = {
    "fp4": (lambda s: {k.replace("__nf4", "__fp4"): v for k, v in s.items()}, "type is fp4"),
    "no quant state": (lambda s: {"weight": s["weight"]}, "not a weight that bitsandbytes stored"),
    "wrong blocksize": (lambda s: _edit(s, blocksize=128), "blocks of 128; is the blocksize right"),
    "impossible blocksize": (lambda s: _edit(s, blocksize=0), "blocksize must be one of"),
    "huge blocksize": (lambda s: _edit(s, blocksize=2**64), "blocksize must be one of"),
    "blocksize text": (lambda s: _edit(s, blocksize="64"), "bad blocksize"),
    "wrong shape": (lambda s: _edit(s, shape=[64, 65]), "packed must hold"),
    "negative shape": (lambda s: _edit(s, shape=[-1, 64]), "bad shape"),
    "no shape": (lambda s: _edit(s, shape=None), "bad shape"),
    "dtype": (lambda s: _edit(s, dtype="int8"), "bad shape .* or dtype"),
    "type": (lambda s: _edit(s, quant_type="fp4"), "does not describe an nf4"),
    "offset": (lambda s: _edit(s, nested_offset=None), "nested_offset"),
    "nested blocksize": (lambda s: _edit(s, nested_blocksize=128), "nested_blocksize 256"),
    "damaged json": (
        lambda s: {**s, "weight.quant_state.bitsandbytes__nf4": torch.tensor([123, 255, 0], dtype=torch.uint8)},
        "no readable JSON",
    ),
    "absmax missing": (lambda s: {k: v for k, v in s.items() if k != "weight.absmax"}, "'weight.absmax' is missing"),
    "absmax cast": (lambda s: {**s, "weight.absmax": s["weight.absmax"].float()}, "absmax must be torch.uint8"),
    "scales cast": (lambda s: {**s, "weight.nested_absmax": s["weight.nested_absmax"].bfloat16()}, "float32"),
    "other code": (lambda s: {**s, "weight.quant_map": s["weight.quant_map"] * 0.5}, "not the NF4 code"),
    "truncated": (lambda s: {**s, "weight": s["weight"][:-1]}, "packed must hold"),
    "nested missing": (
        lambda s: {k: v for k, v in s.items() if k != "weight.nested_quant_map"},
        "'weight.nested_quant_map' is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_states_name_the_piece(case):
    change, message = BAD[case]
    state = change(nf4_state_dict(quantize_nf4(torch.randn(64, 64))))
    with pytest.raises(ValueError, match=message) as error:
        nf4_from_state_dict(state)
    assert "\n" not in str(error.value)
