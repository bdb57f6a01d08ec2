"""The state of one parameter: its two forms, how a checkpoint's is checked and read, how bitsandbytes' is written.

8-bit: step float32 [], exp_avg and exp_avg_sq uint8 of the parameter's shape, exp_avg_absmax and exp_avg_sq_absmax
float32 [ceil(numel / blocksize)], exp_avg_qmap and exp_avg_sq_qmap float32 [256].
32-bit: step float32 [], exp_avg and exp_avg_sq float32 of the parameter's shape: what torch.optim.AdamW keeps.

A state dict of bitsandbytes has the same tensors under other names, at top level (before 0.45) or wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftkern.ops._code_tables import dynamic_map
from peftkern.optim.sharding import local, moment, own_moment, own_scale, scale

State = dict[str, torch.Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_absmax", "exp_avg_sq_absmax")
QMAPS = ("exp_avg_qmap", "exp_avg_sq_qmap")
SIGNED = (True, False)  # the default code books of the two moments
ZERO_CODES = (127, 0)

BNB_WRAPPER = "__bnb_optimizer_quant_state__"
BNB_NAMES = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_absmax",
    "absmax2": "exp_avg_sq_absmax",
    "qmap1": "exp_avg_qmap",
    "qmap2": "exp_avg_sq_qmap",
}


def new_state(
    param: torch.Tensor, step: torch.Tensor, quantized: bool, blocksize: int, device: torch.device | None = None
) -> State:
    """Moments of zero. `step` may be shared with other parameters' states; the code books always are.

    Args:
        device: for moments and scales, in the place of the parameter's.
    """
    state = {"step": step}
    device = param.device if device is None else device
    part = local(param)
    for name, scales, qmap, signed, zero in zip(MOMENTS, SCALES, QMAPS, SIGNED, ZERO_CODES):
        dtype = torch.uint8 if quantized else torch.float32
        state[name] = moment(param, torch.full(part.shape, zero if quantized else 0, dtype=dtype, device=device))
        if quantized:
            zeros = torch.zeros(-(-part.numel() // blocksize), dtype=torch.float32, device=device)
            state[scales] = scale(param, zeros, blocksize)
            state[qmap] = dynamic_map(signed, param.device)
    return state


def is_quantized(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the moments are 8-bit codes."""
    return state["exp_avg"].dtype == torch.uint8


def read_state(
    owner: str,
    which: str,
    param: torch.Tensor,
    saved: Mapping[str, Any],
    blocksize: int,
    device: torch.device | None = None,
) -> State:
    """A checkpoint's state of one parameter, checked, as tensors of its own on the parameter's device.

    Args:
        owner, which: who asks and for what parameter, for messages.
        saved: our layout, torch.optim.AdamW's, or bitsandbytes' (wrapped or not). Codes are taken as they are; moments
            of a float dtype become a 32-bit state, whatever the parameter's size.
        device: for moments and scales, in the place of the parameter's.

    Raises:
        ValueError: for a missing tensor, another shape, dtype or blocksize, or a code book that is none.
    """
    saved = dict(saved)
    saved |= saved.pop(BNB_WRAPPER, {})
    saved = {BNB_NAMES.get(name, name): value for name, value in saved.items()}
    what = f"{owner}.load_state_dict: the state of {which}"
    if "max_exp_avg_sq" in saved:
        raise ValueError(f"{what} is AMSGrad's, which {owner} does not do; load it into torch.optim.AdamW")
    for name in ("step", *MOMENTS):
        if name not in saved:
            raise ValueError(f"{what} lacks {name!r}, it has {sorted(map(str, saved))}; is it an AdamW checkpoint?")
    for name in MOMENTS:
        if saved[name].shape != param.shape:
            found = list(saved[name].shape)
            raise ValueError(
                f"{what} has {name} of shape {found}, the parameter {list(param.shape)}; is it this model's?"
            )
    step = torch.tensor(float(saved["step"]), dtype=torch.float32, device=param.device)
    moments = {name: own_moment(param, saved[name].detach()) for name in MOMENTS}
    home = param.device if device is None else device
    if all(t.dtype.is_floating_point for t in moments.values()):
        return {"step": step} | {n: moment(param, t.to(home, torch.float32, copy=True)) for n, t in moments.items()}
    for name, codes in moments.items():
        if codes.dtype != torch.uint8:
            raise ValueError(f"{what} has {name} in {codes.dtype}, not uint8 codes; was it cast on the way?")
    state = {"step": step} | {n: moment(param, t.to(home, copy=True).contiguous()) for n, t in moments.items()}
    blocks = -(-param.numel() // blocksize)
    for name in SCALES:
        scales = _tensor(what, saved, name)
        if scales.numel() != blocks:
            raise ValueError(
                f"{what} has {scales.numel()} block scales in {name}, {blocks} are needed for blocks of {blocksize}; "
                f"construct {owner} with the blocksize of the checkpoint"
            )
        own = own_scale(param, scales, blocksize)
        if not bool((torch.isfinite(own) & (own >= 0)).all()):
            raise ValueError(f"{what} has scales in {name} that are negative or not finite; the checkpoint is damaged")
        state[name] = scale(param, own.to(home, copy=True).reshape(-1), blocksize)
    for name, signed in zip(QMAPS, SIGNED):
        state[name] = _code_book(what, name, _tensor(what, saved, name), signed).to(param.device, copy=True)
    return state


def _tensor(what: str, saved: Mapping[str, Any], name: str) -> torch.Tensor:
    if name not in saved:
        raise ValueError(f"{what} has uint8 codes but no {name!r}; the checkpoint is incomplete")
    if saved[name].dtype != torch.float32:
        raise ValueError(f"{what} has {name} in {saved[name].dtype}, not float32; was it cast on the way?")
    return saved[name].detach()


def _code_book(what: str, name: str, qmap: torch.Tensor, signed: bool) -> torch.Tensor:
    values = qmap.cpu()
    lowest = -1.0 if signed else 0.0
    fits = values.shape == (256,) and bool(((values >= lowest) & (values <= 1.0)).all())
    if not fits or not bool((values.diff() > 0).all()):
        raise ValueError(
            f"{what} has a {name} that is no code book: 256 ascending values from {lowest:g} to 1 are needed; "
            "was the checkpoint written by another kind of 8-bit optimizer?"
        )
    return qmap


def share_steps(states: Iterable[State]) -> None:
    """Gives states at one count, on one device, one tensor for it, so that one call can update their parameters."""
    counts: dict[tuple[torch.device, float], torch.Tensor] = {}
    for state in states:
        state["step"] = counts.setdefault((state["step"].device, float(state["step"])), state["step"])


def share_code_books(states: Iterable[State]) -> None:
    """Gives states with equal code books one tensor for them per device: the default where it is that."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: the tensor, kept alive, and what replaces it
    books: dict[tuple[torch.device, bytes], torch.Tensor] = {}
    for state in states:
        for name, signed in zip(QMAPS, SIGNED):
            if name not in state:
                continue
            qmap = state[name]
            if id(qmap) not in seen:
                default = dynamic_map(signed, qmap.device)
                key = (qmap.device, qmap.cpu().numpy().tobytes())
                shared = default if torch.equal(default, qmap) else books.setdefault(key, qmap)
                seen[id(qmap)] = (qmap, shared)
            state[name] = seen[id(qmap)][1]


def bitsandbytes_state(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The same state as bitsandbytes 0.45 and later writes it; the tensors are shared with `state`."""
    wrapped = {theirs: state[ours] for theirs, ours in BNB_NAMES.items() if ours in state}
    return {"step": math.floor(float(state["step"])), BNB_WRAPPER: wrapped}
