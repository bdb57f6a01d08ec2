"""State dicts: what is read is checked as a whole first; what bitsandbytes reads is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftkern.optim.groups import check_group, parameter_name
from peftkern.optim.state import State, bitsandbytes_state, read_state

if TYPE_CHECKING:
    from peftkern.optim.adamw8bit import AdamW8bit

_OWN_OPTIONS = ("maximize", "min_8bit_size", "blocksize", "stochastic_rounding", "seed")  # not bitsandbytes'


class Held:
    """A state on its way through torch's load_state_dict, which casts tensors, dicts and iterables but not this."""

    def __init__(self, state: State) -> None:
        self.state = state


def read_checkpoint(optimizer: AdamW8bit, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with options completed and states as they will be kept, each in a `Held`.

    Raises:
        ValueError: it does not fit the optimizer, of which nothing has changed.
    """
    name = type(optimizer).__name__
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"{name}.load_state_dict: the checkpoint has groups of {saved_sizes} parameters, the optimizer of {sizes}; "
            "build it from the same parameters in the same order"
        )
    merged = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups)):
        if saved.get("amsgrad"):
            raise ValueError(f"{name}.load_state_dict: the checkpoint uses AMSGrad, which {name} does not do")
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")} | saved
        if options["blocksize"] != group["blocksize"]:
            raise ValueError(
                f"{name}.load_state_dict: the checkpoint's blocksize is {options['blocksize']}, the optimizer's "
                f"{group['blocksize']}; construct it with that of the checkpoint"
            )
        check_group(name, index, options | {"params": group["params"]})
        merged.append(options)
    states: dict[Any, Any] = {}
    saved_states = dict(state_dict["state"])
    for index, (group, saved) in enumerate(zip(groups, saved_groups)):
        for i, (param, key) in enumerate(zip(group["params"], saved["params"])):
            if key in saved_states:
                which = parameter_name(group, index, i)
                entry = saved_states.pop(key)
                device = optimizer._state_device(param, new=False)
                states[key] = Held(read_state(name, which, param, entry, group["blocksize"], device))
    return dict(state_dict) | {"state": states | saved_states, "param_groups": merged}


def bitsandbytes_state_dict(
    owner: str, groups: Sequence[Mapping[str, Any]], packed: Mapping[str, Any]
) -> dict[str, Any]:
    """What `bitsandbytes.optim.AdamW8bit.load_state_dict` takes, of a state dict of ours. Tensors are shared.

    Raises:
        ValueError: bitsandbytes lacks something that the groups use.
    """
    if any(group["blocksize"] != 256 for group in groups):
        raise ValueError(f"{owner}: bitsandbytes reads blocks of 256 only; construct it with blocksize=256")
    if any(group["maximize"] for group in groups):
        raise ValueError(f"{owner}: bitsandbytes has no maximize; negate the loss instead")
    theirs = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    options = []
    for group in packed["param_groups"]:
        kept = {key: value for key, value in group.items() if key not in _OWN_OPTIONS}
        options.append(kept | theirs | {"lr": float(group["lr"])})
    return {
        "state": {index: bitsandbytes_state(state) for index, state in packed["state"].items()},
        "param_groups": options,
    }
