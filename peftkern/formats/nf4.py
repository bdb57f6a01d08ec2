"""NF4 weights under bitsandbytes' state-dict keys: what it wrote loads bit for bit, and the reverse."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from peftkern.ops._code_tables import nf4_code
from peftkern.ops.nf4.weight import NESTED_BLOCKSIZE, NF4Weight

_QUANT_STATE = "quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def nf4_state_dict(q: NF4Weight, prefix: str = "weight") -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes' Linear4bit stores for a weight, in its order.

    Args:
        q: the weight. Codes and scales are returned as they are, not copied.
        prefix: what the keys start with.

    Returns:
        {prefix} uint8 [bytes, 1], .absmax, .quant_map float32 [16], with double quantization .nested_absmax and
        .nested_quant_map, and .quant_state.bitsandbytes__nf4: the rest as JSON in a uint8 tensor. Reading the offset
        of the scales for that JSON waits for the device.
    """
    fields: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": q.blocksize,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    # The two code books are copies: tables shared between weights would be dropped from a file as duplicates.
    tensors = {prefix: q.packed, f"{prefix}.absmax": q.absmax, f"{prefix}.quant_map": nf4_code(q.device).clone()}
    if q.nested_absmax is not None and q.nested_code is not None and q.nested_offset is not None:
        fields["nested_blocksize"] = q.nested_blocksize
        fields["nested_dtype"] = "float32"
        fields["nested_offset"] = 0.0 if q.nested_offset.is_meta else q.nested_offset.item()
        tensors[f"{prefix}.nested_absmax"] = q.nested_absmax
        tensors[f"{prefix}.nested_quant_map"] = q.nested_code.clone()
    text = json.dumps(fields).encode("utf-8")
    tensors[f"{prefix}.{_QUANT_STATE}nf4"] = torch.tensor(list(text), dtype=torch.uint8, device=q.device)
    return tensors


def is_nf4_key(key: str, prefix: str = "weight") -> bool:
    """Whether `key` belongs to the quantized weight `prefix`."""
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    rest = key.removeprefix(f"{prefix}.")
    return key == prefix or (rest != key and (rest in names or rest.startswith(_QUANT_STATE)))


def nf4_from_state_dict(state: Mapping[str, torch.Tensor], prefix: str = "weight") -> NF4Weight:
    """The weight that bitsandbytes, or `nf4_state_dict`, stored under `prefix`.

    Args:
        state: holds the keys that `nf4_state_dict` lists; others are ignored. A weight stored as float16, bfloat16 or
            float32 (bitsandbytes' quant_storage) is a reinterpretation of the same bytes and loads too.
        prefix: what the keys start with.

    Returns:
        NF4Weight on the packed bytes' device that shares their memory.

    Raises:
        ValueError: a missing key, another quantization type (fp4), another code book, or pieces that disagree.
    """
    where = f"NF4 weight {prefix!r}"
    fields = _read_fields(state, prefix, where)
    packed = _get(state, prefix, where)
    if not packed.is_contiguous():
        packed = packed.contiguous()
    if packed.dtype != torch.uint8:
        packed = packed.view(torch.uint8)
    packed = packed.reshape(-1, 1)
    device = packed.device
    code = _get(state, f"{prefix}.quant_map", where)
    if not code.is_meta and not torch.equal(code.cpu(), nf4_code(torch.device("cpu"))):
        raise ValueError(f"{where}: its quant_map is not the NF4 code (float32); quantize the original weight again")
    absmax = _get(state, f"{prefix}.absmax", where).to(device)
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None] = (None, None, None)
    if f"{prefix}.nested_absmax" in state:
        offset = fields.get("nested_offset")
        if not isinstance(offset, float) or fields.get("nested_blocksize") != NESTED_BLOCKSIZE:
            raise ValueError(
                f"{where}: double quantization needs a nested_offset and nested_blocksize {NESTED_BLOCKSIZE}, got "
                f"{offset!r} and {fields.get('nested_blocksize')!r}; quantize the original weight again"
            )
        nested = (
            _get(state, f"{prefix}.nested_absmax", where).to(device),
            _get(state, f"{prefix}.nested_quant_map", where).to(device),
            # float32 whatever the default dtype: under a bfloat16 default the offset would be rounded.
            torch.tensor(offset, dtype=torch.float32, device=device),
        )
    shape, dtype, blocksize = _read_layout(fields, where)
    q = NF4Weight(packed, absmax, shape, dtype, blocksize, *nested)
    try:
        q.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return q


def _read_fields(state: Mapping[str, torch.Tensor], prefix: str, where: str) -> dict:
    start = f"{prefix}.{_QUANT_STATE}"
    kinds = [key.removeprefix(start) for key in state if key.startswith(start)]
    if not kinds:
        raise ValueError(f"{where}: no key {start}nf4; this is not a weight that bitsandbytes stored in 4 bits")
    if kinds != ["nf4"]:
        raise ValueError(f"{where}: quantization type is {' and '.join(kinds)}, only nf4 is supported; requantize it")
    try:
        fields = json.loads(bytes(state[f"{start}nf4"].flatten().tolist()))
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        raise ValueError(f"{where}: {start}nf4 holds no readable JSON; the file is damaged, copy it again") from None
    if not isinstance(fields, dict) or fields.get("quant_type") != "nf4":
        raise ValueError(f"{where}: {start}nf4 does not describe an nf4 weight; the file is damaged, copy it again")
    return fields


def _read_layout(fields: dict, where: str) -> tuple[torch.Size, torch.dtype, int]:
    shape, dtype, blocksize = fields.get("shape"), _DTYPES.get(str(fields.get("dtype"))), fields.get("blocksize")
    sizes = [size for size in shape if isinstance(size, int) and 0 <= size < 2**62] if isinstance(shape, list) else []
    if sizes != shape or dtype is None:
        raise ValueError(f"{where}: bad shape {shape!r} or dtype {fields.get('dtype')!r}; the file is damaged")
    if not isinstance(blocksize, int):
        raise ValueError(f"{where}: bad blocksize {blocksize!r}; the file is damaged, copy it again")
    return torch.Size(sizes), dtype, blocksize


def _get(state: Mapping[str, torch.Tensor], key: str, where: str) -> torch.Tensor:
    tensor = state.get(key)
    if tensor is None:
        raise ValueError(f"{where}: key {key!r} is missing; the checkpoint is incomplete")
    return tensor.detach()
