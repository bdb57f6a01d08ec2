"""AdamW8bit: torch.optim.AdamW with block-wise 8-bit moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from peftkern.optim.checkpoint import Held, bitsandbytes_state_dict, read_checkpoint
from peftkern.optim.groups import check_gradients, check_group
from peftkern.optim.plan import StepPlan
from peftkern.optim.state import QMAPS, is_quantized, new_state, share_code_books, share_steps
from peftkern.optim.update import Bucket, dense_parts, gradients, make_bucket, update, write_back
from peftkern.optim.verdict import Verdict, look


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
    _verdict: tuple[torch.Tensor, torch.Tensor] | None = None  # where a planned step's flag and norm go
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
            check_group(type(self).__name__, len(self.param_groups) - 1, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

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
        if self._plan is not None and self._plan.step(self):
            return
        for index, group in enumerate(self.param_groups):
            check_gradients(type(self).__name__, index, group)
        found = [(group, *bucket) for group in self.param_groups for bucket in self._buckets(group)]
        work = [make_bucket(*bucket, number) for number, bucket in enumerate(found)]
        self._prepare(work)
        self._update(work, look(self, work))
        self._plan = self._new_plan(work)

    def _prepare(self, work: Sequence[Bucket]) -> None:
        """Called before a step changes anything."""

    def _update(self, work: Sequence[Bucket], verdicts: Mapping[torch.device, Verdict]) -> None:
        """Updates the parameters of all buckets."""
        states = self.state
        for bucket in work:
            params = bucket.params
            dense = dense_parts(params)
            self._apply(
                bucket._replace(params=dense),
                gradients(params),
                [states[param] for param in params],
                verdicts[bucket.step.device],
            )
            write_back(params, dense)

    def _apply(
        self,
        bucket: Bucket,
        grads: Sequence[torch.Tensor],
        states: Sequence[Mapping[str, torch.Tensor]],
        verdict: Verdict,
    ) -> None:
        """All updates pass here."""
        update(bucket, grads, states, verdict)

    def _new_plan(self, work: Sequence[Bucket]) -> StepPlan | None:
        return StepPlan.of(self, work)

    def _state_device(self, param: torch.Tensor, new: bool) -> torch.device:
        """Where the moments of a new or a loaded state are made."""
        return param.device

    def _buckets(self, group: Mapping[str, Any]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """The group's parameters with gradients, by what one call has in common: step count, device, code books.

        Parameters that advance together share the tensor of their step count; those that stay behind keep the old one.
        """
        states = self.state
        active, waiting = [], set()
        fresh: dict[torch.device, torch.Tensor] = {}
        for param in group["params"]:
            state = states.get(param)
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
                states[param] = new_state(param, step, quantized, group["blocksize"], device)
        buckets: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
        advanced: dict[int, torch.Tensor] = {}
        for param in active:
            state = states[param]
            if id(state["step"]) in waiting:
                old = state["step"]
                state["step"] = advanced[id(old)] = advanced[id(old)] if id(old) in advanced else old.clone()
            books = tuple(id(state[name]) for name in QMAPS) if is_quantized(state) else ()
            buckets[(id(state["step"]), *books)].append(param)
        return [(states[params[0]]["step"], params) for params in buckets.values()]

    def _skip_counter(self, device: torch.device) -> torch.Tensor:
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        elif self._skipped.device != device:
            self._skipped = self._skipped.to(device)
        return self._skipped

    def _verdict_memory(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._verdict is None or self._verdict[0].device != device:
            flag, norm = torch.zeros(2, dtype=torch.float32, device=device).unbind()
            self._verdict = (flag, norm)
        return self._verdict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint: ours, torch.optim.AdamW's, or bitsandbytes' AdamW8bit's.

        Codes and scales are never cast to the parameters' dtype. Group options that the checkpoint lacks keep their
        values.

        Raises:
            ValueError: the checkpoint does not fit; the optimizer then is as it was.
        """
        # Registered here, so that it runs after every hook of the user's, whose changes it must see.
        handle = self.register_load_state_dict_pre_hook(read_checkpoint)  # type: ignore[arg-type]
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state as `bitsandbytes.optim.AdamW8bit.load_state_dict` takes it. Tensors are shared with the optimizer.

        Raises:
            ValueError: the blocksize is not bitsandbytes' 256, or a group maximizes, which it cannot.
        """
        return bitsandbytes_state_dict(type(self).__name__, self.param_groups, self.state_dict())

    def __getstate__(self) -> dict[str, Any]:
        own = {"_skipped": self._skipped, "max_norm": self.max_norm, "check_finite": self.check_finite}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        if "state" in state:
            held = {key: value.state if isinstance(value, Held) else value for key, value in state["state"].items()}
            state = state | {"state": defaultdict(dict, held)}
        super().__setstate__(state)
        states = self.state
        for group in self.param_groups:
            share_steps(states[param] for param in group["params"] if states.get(param))
        share_code_books(states[param] for param in states if isinstance(param, torch.Tensor))
