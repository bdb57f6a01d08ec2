"""AdamW8bit: torch.optim.AdamW with block-wise 8-bit moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from peftkern.ops._frozen_weight import is_sharded
from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.op import BLOCKSIZES, FLOAT_DTYPES, check_hyper, is_expanded
from peftkern.optim.sharding import agree, local, own_gradient, unfit
from peftkern.optim.state import (
    MOMENTS,
    QMAPS,
    SCALES,
    State,
    bitsandbytes_state,
    is_quantized,
    new_state,
    read_state,
    share_code_books,
    share_steps,
)

_ops = torch.ops.peftkern

Work = list[tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]]  # group, step count, parameters: a bucket each


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take 2.03 bytes per parameter instead of 8, as bitsandbytes stores them.

    Semantics are torch.optim.AdamW's: parameter groups, schedulers, closures, hooks, `state_dict`, GradScaler
    (`grad_scale` and `found_inf` are read as its fused kernels do). All tensors of a group are updated in one call. A
    step with a gradient that is NaN, infinite or of magnitude 2^63 and more changes nothing and is counted in
    `skipped_steps`. Resuming from a checkpoint is bitwise equal to not stopping.

    Args:
        params: float32, float16 or bfloat16 parameters, or groups of them. A group may set its own lr, betas, eps,
            weight_decay, maximize, min_8bit_size and blocksize.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the moments.
        eps: added to the denominator, outside of the root.
        weight_decay: decoupled from the gradient.
        amsgrad: must be False.
        min_8bit_size: smaller parameters keep float32 moments.
        blocksize: elements per scale, 64 to 4096, a power of two. bitsandbytes' is 256 (2048 before 0.44).
        maximize: ascend instead of descend.

    Raises:
        ValueError: for a rate out of range, a parameter of another dtype, a blocksize that is not offered.

    Source: Dettmers et al. 2022, arXiv:2110.02861; Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands its scale over instead of rewriting the gradients

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        min_8bit_size: int = 4096,
        blocksize: int = 256,
        maximize: bool = False,
    ) -> None:
        name = type(self).__name__
        if amsgrad:
            raise ValueError(f"{name}: amsgrad is not offered; use torch.optim.AdamW(amsgrad=True)")
        self._skipped: torch.Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "min_8bit_size": min_8bit_size,
            "blocksize": blocksize,
        }
        super().__init__(params, defaults)

    @property
    def skipped_steps(self) -> int:
        """How many calls of `step` changed nothing because of a gradient that is not finite. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch.optim.Optimizer does.

        Raises:
            ValueError, TypeError: as for the constructor; the optimizer then has the groups that it had.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if len(group["betas"]) != 2:
            raise ValueError(f"{name}: betas must be two numbers, got {group['betas']}")
        beta1, beta2 = group["betas"]
        check_hyper(name, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        if group["blocksize"] not in BLOCKSIZES:
            raise ValueError(f"{name}: blocksize must be one of {BLOCKSIZES}, got {group['blocksize']}")
        if group["min_8bit_size"] < 0:
            raise ValueError(f"{name}: min_8bit_size must be at least 0, got {group['min_8bit_size']}")
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError(f"{name}: param_groups[{index}] holds a parameter twice; list each parameter once")
        for i, param in enumerate(group["params"]):
            found = None
            if (
                is_sharded(param)
                and param.numel() >= group["min_8bit_size"]
                and (why := unfit(param, group["blocksize"]))
            ):
                raise ValueError(
                    f"{name}: 8-bit states of {_name(group, index, i)} cannot be sharded: {why}; give its group a "
                    "min_8bit_size above its size, which keeps its states in 32 bits"
                )
            if param.layout != torch.strided:
                found = str(param.layout)
            elif is_expanded(local(param)):
                found = "an expanded tensor, whose elements share memory"
            elif param.dtype not in FLOAT_DTYPES:
                found = str(param.dtype)
            if found:
                which = _name(group, index, i)
                raise ValueError(f"{name}: {which} must be dense float32, float16 or bfloat16, got {found}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient is sparse or of a dtype that no float parameter has; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        for index, group in enumerate(self.param_groups):
            self._check_gradients(index, group)
        work = [(group, step, params) for group in self.param_groups for step, params in self._buckets(group)]
        self._prepare(work)
        found_inf = self._find_inf([param for _, _, params in work for param in params])
        for step in {id(step): step for _, step, _ in work}.values():
            step.add_(1 - found_inf[step.device])
        self._update(work, found_inf)

    def _prepare(self, work: Work) -> None:
        """Called before a step changes anything."""

    def _update(self, work: Work, found_inf: dict[torch.device, torch.Tensor]) -> None:
        for group, step, params in work:
            states = [self.state[param] for param in params]
            dense = [local(param).contiguous() for param in params]
            self._apply(group, step, dense, gradients(params), states, found_inf[step.device])
            write_back(params, dense)

    def _check_gradients(self, index: int, group: Mapping[str, Any]) -> None:
        for i, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None or (grad.layout == torch.strided and grad.dtype in FLOAT_DTYPES):
                continue
            found = grad.dtype if grad.layout == torch.strided else grad.layout
            cure = "use torch.optim.SparseAdam, or a layer with sparse=False" if grad.is_sparse else "cast it"
            raise ValueError(
                f"{type(self).__name__}: the gradient of {_name(group, index, i)} must be dense float32, float16 or "
                f"bfloat16, got {found}; {cure}"
            )

    def _buckets(self, group: Mapping[str, Any]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """The group's parameters with gradients, by what one call has in common: step count, device, code books.

        Parameters that advance together share the tensor of their step count; those that stay behind keep the old one.
        """
        active, waiting = [], set()
        fresh: dict[torch.device, torch.Tensor] = {}
        for param in group["params"]:
            state = self.state.get(param)
            if param.grad is None:
                if state:
                    waiting.add(id(state["step"]))
                continue
            active.append(param)
            if not state:
                step = fresh.get(param.device)
                if step is None:
                    step = fresh[param.device] = torch.zeros((), dtype=torch.float32, device=param.device)
                quantized = param.numel() >= group["min_8bit_size"]
                device = self._state_device(param, new=True)
                self.state[param] = new_state(param, step, quantized, group["blocksize"], device)
        buckets: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
        advanced: dict[int, torch.Tensor] = {}
        for param in active:
            state = self.state[param]
            if id(state["step"]) in waiting:
                old = state["step"]
                state["step"] = advanced[id(old)] = advanced[id(old)] if id(old) in advanced else old.clone()
            books = tuple(id(state[name]) for name in QMAPS) if is_quantized(state) else ()
            buckets[(id(state["step"]), *books)].append(param)
        return [(self.state[params[0]]["step"], params) for params in buckets.values()]

    def _find_inf(self, params: list[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
        """A flag on each device, float32 []: 1 where this step must change nothing. The host does not wait for it."""
        grads: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        for param, grad in zip(params, gradients(params)):
            grads[param.device].append(grad)
        known = getattr(self, "found_inf", None)  # set by GradScaler around step()
        if known is not None:
            found_inf = {device: known.to(device, torch.float32).reshape(()) for device in grads}
        else:
            found_inf = {device: torch.zeros((), device=device) for device in grads}
            for device, tensors in grads.items():
                _ops.adamw8bit_found_inf_(tensors, self._grad_scale(device), found_inf[device])
        flags = list(found_inf.values())
        if flags:
            anywhere = torch.stack([flag.to(flags[0].device) for flag in flags]).amax() if len(flags) > 1 else flags[0]
            anywhere = agree(anywhere, params)
            if self._skipped is None:
                self._skipped = torch.zeros((), dtype=torch.int64, device=anywhere.device)
            self._skipped += (anywhere != 0).to(self._skipped.device)
            found_inf = {device: (anywhere != 0).to(device, torch.float32) for device in found_inf}
        return found_inf

    def _grad_scale(self, device: torch.device) -> torch.Tensor | None:
        scale = getattr(self, "grad_scale", None)  # set by GradScaler around step()
        return None if scale is None else scale.to(device, torch.float32).reshape(())

    def _state_device(self, param: torch.Tensor, new: bool) -> torch.device:
        """Where the moments of a new or a loaded state are made."""
        return param.device

    def _apply(
        self,
        group: Mapping[str, Any],
        step: torch.Tensor,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: Sequence[Mapping[str, torch.Tensor]],
        found_inf: torch.Tensor,
    ) -> None:
        """Updates contiguous tensors, or runs of whole blocks of them, with one group, step and pair of code books."""
        update = self._update_8bit if is_quantized(states[0]) else self._update_32bit
        update(group, step, params, grads, states, found_inf)

    def _update_8bit(
        self,
        group: Mapping[str, Any],
        step: torch.Tensor,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: Sequence[Mapping[str, torch.Tensor]],
        found_inf: torch.Tensor,
    ) -> None:
        lr = group["lr"]
        on_device = isinstance(lr, torch.Tensor) and lr.device == step.device
        _ops.adamw8bit_step_(
            params,
            grads,
            *([local(state[name]) for state in states] for name in MOMENTS),
            *([local(state[name]).view(-1) for state in states] for name in SCALES),
            *(states[0][name] for name in QMAPS),
            0.0 if on_device else float(lr),
            lr if on_device else None,
            0.0,
            step,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["blocksize"],
            self._grad_scale(step.device),
            found_inf,
            group["maximize"],
        )

    def _update_32bit(
        self,
        group: Mapping[str, Any],
        step: torch.Tensor,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: Sequence[Mapping[str, torch.Tensor]],
        found_inf: torch.Tensor,
    ) -> None:
        if not found_inf.is_cuda and found_inf:
            return
        lr, (beta1, beta2) = group["lr"], group["betas"]
        numbers = reference.numbers(
            lr if isinstance(lr, torch.Tensor) and lr.device == step.device else float(lr),
            step,
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            self._grad_scale(step.device),
            group["maximize"],
        )
        for param, grad, state in zip(params, grads, states):
            m, v = (local(state[name]) for name in MOMENTS)
            updated = reference.update(param, grad, m * beta1, v * beta2, numbers)
            reference.assign((param, m, v), updated, found_inf)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint: ours, torch.optim.AdamW's, or bitsandbytes' AdamW8bit's.

        Codes and scales are never cast to the parameters' dtype. Group options that the checkpoint lacks keep their
        values.

        Raises:
            ValueError: the checkpoint does not fit; the optimizer then is as it was.
        """
        # Registered here, so that it runs after every hook of the user's, whose changes it must see.
        handle = self.register_load_state_dict_pre_hook(_read_checkpoint)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state as `bitsandbytes.optim.AdamW8bit.load_state_dict` takes it. Tensors are shared with the optimizer.

        Raises:
            ValueError: the blocksize is not bitsandbytes' 256, or a group maximizes, which it cannot.
        """
        name = type(self).__name__
        if any(group["blocksize"] != 256 for group in self.param_groups):
            raise ValueError(f"{name}: bitsandbytes reads blocks of 256 only; construct it with blocksize=256")
        if any(group["maximize"] for group in self.param_groups):
            raise ValueError(f"{name}: bitsandbytes has no maximize; negate the loss instead")
        packed = self.state_dict()
        theirs = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
        groups = []
        for group in packed["param_groups"]:
            kept = {k: v for k, v in group.items() if k not in ("maximize", "min_8bit_size", "blocksize")}
            groups.append(kept | theirs | {"lr": float(group["lr"])})
        return {
            "state": {index: bitsandbytes_state(state) for index, state in packed["state"].items()},
            "param_groups": groups,
        }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "state" in state:
            held = {key: value.state if isinstance(value, _Held) else value for key, value in state["state"].items()}
            state = state | {"state": defaultdict(dict, held)}
        super().__setstate__(state)
        for group in self.param_groups:
            share_steps(self.state[param] for param in group["params"] if self.state.get(param))
        share_code_books(self.state[param] for param in self.state if isinstance(param, torch.Tensor))


def gradients(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's gradients, contiguous."""
    return [own_gradient(param).contiguous() for param in params]


def write_back(params: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> None:
    """Ends an update of `dense`, the parameters' own parts made contiguous."""
    for param, updated in zip(params, dense):
        part = local(param)
        if updated.data_ptr() != part.data_ptr():
            part.copy_(updated)
    torch.autograd.graph.increment_version(params)


class _Held:
    """A state on its way through torch's load_state_dict, which casts tensors, dicts and iterables but not this."""

    def __init__(self, state: State) -> None:
        self.state = state


def _read_checkpoint(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks the whole checkpoint before anything of the optimizer changes."""
    assert isinstance(optimizer, AdamW8bit)
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
        optimizer._check_group(index, options | {"params": group["params"]})
        merged.append(options)
    states: dict[Any, Any] = {}
    saved_states = dict(state_dict["state"])
    for index, (group, saved) in enumerate(zip(groups, saved_groups)):
        for i, (param, key) in enumerate(zip(group["params"], saved["params"])):
            if key in saved_states:
                which = _name(group, index, i)
                entry = saved_states.pop(key)
                device = optimizer._state_device(param, new=False)
                states[key] = _Held(read_state(name, which, param, entry, group["blocksize"], device))
    return state_dict | {"state": states | saved_states, "param_groups": merged}


def _name(group: Mapping[str, Any], index: int, i: int) -> str:
    names: Iterable[str] | None = group.get("param_names")
    return f"parameter {list(names)[i]!r}" if names else f"param_groups[{index}]['params'][{i}]"
