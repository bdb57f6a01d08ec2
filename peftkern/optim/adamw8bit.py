"""AdamW8bit: torch.optim.AdamW with block-wise 8-bit moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from peftkern.ops._frozen_weight import is_sharded
from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.function import code_tables
from peftkern.ops.adamw8bit.op import BLOCKSIZES, FLOAT_DTYPES, check_hyper, is_expanded
from peftkern.optim.plan import StepPlan, Work, rounding_seed
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

OWN_OPTIONS = ("maximize", "min_8bit_size", "blocksize", "stochastic_rounding", "seed")  # not bitsandbytes'
Verdict = tuple[torch.Tensor, torch.Tensor | None]  # flag, norm


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take 2.03 bytes per parameter instead of 8, as bitsandbytes stores them.

    Semantics are torch.optim.AdamW's: parameter groups, schedulers, closures, hooks, `state_dict`, GradScaler
    (`grad_scale` and `found_inf` are read as its fused kernels do). All tensors of a group are updated in one call. A
    step with a gradient that is NaN, infinite or of magnitude 2^63 and more changes nothing and is counted in
    `skipped_steps` (see `check_finite`). Resuming from a checkpoint is bitwise equal to not stopping.

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
        max_norm: scales the gradients of all groups down together, inside the step, so that their norm is at most this,
            as torch.nn.utils.clip_grad_norm_ does; the gradients themselves stay as they are. None: no clipping.
        check_finite: look at all gradients before anything is written. Without, and without clipping or a GradScaler
            that looks, a gradient that is not finite spoils its parameter and the moments of its block, as it does in
            torch.optim.AdamW; the look reads the gradients once more.
        stochastic_rounding: round bfloat16 parameters up or down with a probability of what is dropped, so that
            updates too small for a bfloat16 are not lost. Counter-based: the same run gives the same numbers.
        seed: of the stochastic rounding.

    Raises:
        ValueError: for a rate out of range, a parameter of another dtype, a blocksize that is not offered.

    Source: Dettmers et al. 2022, arXiv:2110.02861; Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    _plan: StepPlan | None = None  # of a step like the last one
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
        max_norm: float | None = None,
        check_finite: bool = True,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        if amsgrad:
            raise ValueError(f"{name}: amsgrad is not offered; use torch.optim.AdamW(amsgrad=True)")
        if max_norm is not None and not max_norm >= 0.0:
            raise ValueError(f"{name}: max_norm must be at least 0, or None, got {max_norm}")
        self._skipped: torch.Tensor | None = None
        self.max_norm, self.check_finite = max_norm, check_finite
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "min_8bit_size": min_8bit_size,
            "blocksize": blocksize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
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
            if is_sharded(param):
                found = "a sharded DTensor"
            elif param.layout != torch.strided:
                found = str(param.layout)
            elif is_expanded(param):
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
        if self._plan is not None and self._plan.step(self):
            return loss
        for index, group in enumerate(self.param_groups):
            self._check_gradients(index, group)
        work = [(group, step, params) for group in self.param_groups for step, params in self._buckets(group)]
        verdicts = self._look(work)
        for place, (group, step, params) in enumerate(work):
            update = self._update_8bit if is_quantized(self.state[params[0]]) else self._update_32bit
            update(group, step, params, rounding_seed(group, place), *verdicts[step.device])
        self._plan = StepPlan.of(self, work)
        return loss

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
                self.state[param] = new_state(param, step, quantized, group["blocksize"])
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

    def _look(self, work: Sequence[Work]) -> dict[torch.device, Verdict]:
        """Looks at the gradients and counts the step, on each device; the host does not wait for it.

        Returns:
            By device: a flag, float32 [], not 0 where this step must change nothing, and the norm of all gradients
            where they are clipped.
        """
        looks = self._looks()
        grads: dict[torch.device, list[torch.Tensor]] = {}
        steps: dict[torch.device, dict[int, torch.Tensor]] = {}
        for _, step, params in work:
            steps.setdefault(step.device, {})[id(step)] = step
            seen = grads.setdefault(step.device, [])
            if looks:
                seen += [_contiguous(param.grad) for param in params]  # type: ignore[arg-type]
        verdicts: dict[torch.device, Verdict] = {}
        for device in grads:
            verdicts[device] = self._new_verdict(device)
        if not verdicts:
            return verdicts
        first = next(iter(verdicts))
        counter = self._skip_counter(first)
        if len(verdicts) > 1:
            for device, (flag, norm) in verdicts.items():
                _ops.adamw8bit_found_inf_(grads.pop(device), self._grad_scale(device), flag, norm, [], None)
            verdicts = _joined(verdicts)
        for device, (flag, norm) in verdicts.items():
            skipped = counter if device == first else None
            seen, norm = (grads[device], norm) if grads else ([], None)
            counts = list(steps[device].values())
            _ops.adamw8bit_found_inf_(seen, self._grad_scale(device), flag, norm, counts, skipped)
        return verdicts

    def _looks(self) -> bool:
        """Whether this step reads the gradients before it updates. GradScaler sets `found_inf` around step()."""
        return self.max_norm is not None or (self.check_finite and getattr(self, "found_inf", None) is None)

    def _new_verdict(self, device: torch.device) -> Verdict:
        known = getattr(self, "found_inf", None)
        if known is None:
            flag = torch.zeros((), device=device)
        else:
            flag = known.detach().to(device, torch.float32, copy=True).reshape(())
        return flag, None if self.max_norm is None else torch.zeros((), device=device)

    def _skip_counter(self, device: torch.device) -> torch.Tensor:
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        elif self._skipped.device != device:
            self._skipped = self._skipped.to(device)
        return self._skipped

    def _grad_scale(self, device: torch.device) -> torch.Tensor | None:
        scale = getattr(self, "grad_scale", None)  # set by GradScaler around step()
        return None if scale is None else scale.to(device, torch.float32).reshape(())

    def _update_8bit(
        self,
        group: Mapping[str, Any],
        step: torch.Tensor,
        params: list[torch.Tensor],
        seed: int | None,
        found_inf: torch.Tensor,
        norm: torch.Tensor | None,
    ) -> None:
        states = [self.state[param] for param in params]
        dense = [_contiguous(param) for param in params]
        lr = group["lr"]
        on_device = isinstance(lr, torch.Tensor) and lr.device == step.device
        _ops.adamw8bit_step_(
            dense,
            [_contiguous(param.grad) for param in params],  # type: ignore[arg-type]
            *([state[name] for state in states] for name in (*MOMENTS, *SCALES)),
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
            self.max_norm or 0.0,
            norm,
            seed,
            code_tables(*(states[0][name] for name in QMAPS)),
        )
        for param, updated in zip(params, dense):
            if updated is not param:
                param.copy_(updated)
        torch.autograd.graph.increment_version(params)

    def _update_32bit(
        self,
        group: Mapping[str, Any],
        step: torch.Tensor,
        params: list[torch.Tensor],
        seed: int | None,
        found_inf: torch.Tensor,
        norm: torch.Tensor | None,
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
            clip=reference.clip_factor(self.max_norm or 0.0, norm),
        )
        for place, param in enumerate(params):
            m, v = (self.state[param][name] for name in MOMENTS)
            assert param.grad is not None
            new, *moments = reference.update(param, param.grad, m * beta1, v * beta2, numbers)
            if seed is not None and param.dtype == torch.bfloat16:
                new = reference.round_stochastically(new.reshape(-1), place, seed, step).view(param.shape)
            reference.assign((param, m, v), (new, *moments), found_inf)

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
            kept = {key: value for key, value in group.items() if key not in OWN_OPTIONS}
            groups.append(kept | theirs | {"lr": float(group["lr"])})
        return {
            "state": {index: bitsandbytes_state(state) for index, state in packed["state"].items()},
            "param_groups": groups,
        }

    def __getstate__(self) -> dict[str, Any]:
        own = {"_skipped": self._skipped, "max_norm": self.max_norm, "check_finite": self.check_finite}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        if "state" in state:
            held = {key: value.state if isinstance(value, _Held) else value for key, value in state["state"].items()}
            state = state | {"state": defaultdict(dict, held)}
        super().__setstate__(state)
        for group in self.param_groups:
            share_steps(self.state[param] for param in group["params"] if self.state.get(param))
        share_code_books(self.state[param] for param in self.state if isinstance(param, torch.Tensor))


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _joined(verdicts: Mapping[torch.device, Verdict]) -> dict[torch.device, Verdict]:
    """One verdict of all devices, on each of them."""
    first = next(iter(verdicts))
    flag = torch.stack([flag.to(first) for flag, _ in verdicts.values()]).amax()
    norms = [norm.to(first, torch.float64) for _, norm in verdicts.values() if norm is not None]
    norm = torch.stack(norms).square().sum().sqrt().float() if norms else None
    if norm is not None:
        flag = flag.maximum((~norm.isfinite()).float())
    return {device: (flag.to(device), None if norm is None else norm.to(device)) for device in verdicts}


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
                states[key] = _Held(read_state(name, which, param, entry, group["blocksize"]))
    return state_dict | {"state": states | saved_states, "param_groups": merged}


def _name(group: Mapping[str, Any], index: int, i: int) -> str:
    names: Iterable[str] | None = group.get("param_names")
    return f"parameter {list(names)[i]!r}" if names else f"param_groups[{index}]['params'][{i}]"
