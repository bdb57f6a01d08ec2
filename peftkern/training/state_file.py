"""Nested Python state (optimizer, scheduler, random generators) as one safetensors file, so that no pickle is loaded.

Tensors and arrays become the file's tensors; everything around them is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkern.formats.atomic import atomic_save_safetensors, load_safetensors, load_safetensors_metadata
from peftkern.training.errors import UserError

_KEY = "peftkern_state"


def save_state(state: Any, path: str | Path) -> None:
    """Writes `state` atomically.

    Args:
        state: dicts (keys of any plain type), lists, tuples, tensors, numpy arrays, numbers, strings, booleans, None.
        path: of the file.

    Raises:
        TypeError: something else in the state.
        OSError: the file cannot be written; an older one stays as it was.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_encode(state, tensors))
    atomic_save_safetensors(tensors, path, metadata={_KEY: structure})


def load_state(path: str | Path) -> Any:
    """What `save_state` wrote: equal values, types and tensor bits, on the CPU. Raises UserError for another file."""
    tensors, metadata = load_safetensors(path), load_safetensors_metadata(path)
    if _KEY not in metadata:
        raise UserError(f"{path} is no state file of peftkern; resume from a checkpoint that peftkern wrote")
    try:
        return _decode(json.loads(metadata[_KEY]), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); resume from an older checkpoint") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name := str(len(tensors))] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name := str(len(tensors))] = torch.from_numpy(value.copy())
        return {"array": name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save_state: cannot store a {type(value).__name__} without pickle; only plain values and tensors")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
