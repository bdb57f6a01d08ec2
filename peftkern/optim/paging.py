"""PagedAdamW8bit: AdamW8bit with a budget for the device memory of its states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from peftkern.optim.adamw8bit import AdamW8bit
from peftkern.optim.device import CudaDevice, Device, on_out_of_memory
from peftkern.optim.pager import Entry, Pager, Piece
from peftkern.optim.plan import StepPlan
from peftkern.optim.state import State
from peftkern.optim.update import Bucket, dense_parts, gradients, write_back
from peftkern.optim.verdict import Verdict

DeviceBudget = int | Literal["auto"]


def check_device_budget(owner: str, budget: Any) -> DeviceBudget:
    """Returns `budget` if it is one: "auto" or bytes of device memory, 0 and more.

    Raises:
        ValueError, TypeError: naming `owner`.
    """
    cure = 'give "auto" or a number of bytes, 0 for none'
    if budget == "auto":
        return "auto"
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"{owner}: device_budget is {budget!r}; {cure}")
    if budget < 0:
        raise ValueError(f"{owner}: device_budget is {budget}, less than nothing; {cure}")
    return budget


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose states live on the device within a budget, and on the host beyond it.

    Moments and their scales lie in pages: small parameters pooled, a large one alone. Pages within the budget stay on
    the parameters' device and are updated as AdamW8bit does. The others lie in page-locked host memory and pass
    through a small ring on the device during `step`: copies in, updates and copies out run beside each other, and the
    first of the next step are fetched ahead. The results are AdamW8bit's, bit for bit, whatever is where. Step counts
    and code books stay on the device. Parameters on the CPU have nothing to page.

    Pages on the device are given back to training when memory gets tight: after a step whose peak left less free than a
    margin, and when an allocation fails. That allocation raises all the same; the next attempt has the memory.

    Checkpoints do not depend on where pages are: a state dict of either class loads into the other, and what is
    loaded is paged again by the next step. `state` and `state_dict()` wait until what they show is complete; tensors
    taken from them before a later step may lag behind.

    Args:
        params, lr, betas, eps, weight_decay, and the other options: as for AdamW8bit.
        device_budget: bytes of pages on each device; the ring takes up to 128 MiB more where there are others. "auto"
            takes what training leaves free.

    Raises:
        ValueError, TypeError: as AdamW8bit, and for a budget that is none.
    """

    def __init__(self, params: Any, *args: Any, device_budget: DeviceBudget = "auto", **options: Any) -> None:
        self._device_budget = check_device_budget(type(self).__name__, device_budget)
        self._reset()
        super().__init__(params, *args, **options)

    def _reset(self) -> None:
        self._pagers: dict[torch.device, Pager] = {}
        self._stepping = False
        self._shown = True  # states may have been changed or replaced since the last step

    @property
    def device_budget(self) -> DeviceBudget:
        """As given to the constructor. It belongs to the machine: checkpoints neither store nor change it."""
        return self._device_budget

    @property
    def state(self) -> Any:
        """As torch.optim.Optimizer's. Waits for copies to the host that are under way."""
        if not self._stepping:
            self._settle()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def memory(self) -> dict[torch.device, tuple[int, int]]:
        """Bytes of pages on each device, and on the host for it."""
        return {device: pager.sizes() for device, pager in self._pagers.items()}

    def give_back(self, nbytes: int | None = None) -> int:
        """Moves pages from the devices to the host, and waits for it.

        Args:
            nbytes: how much each device needs; None for all.

        Returns:
            Bytes of device memory that are free now. Less than asked for when there is no more, when host memory
            cannot be page-locked, and 0 once a step was captured into a CUDA graph, which holds their addresses.
        """
        if self._stepping:
            return 0
        self._shown = True
        self._plan = None  # which holds the pages' tensors
        return sum(pager.give_back(pager.sizes()[0] if nbytes is None else nbytes) for pager in self._pagers.values())

    def out_of_memory(self, device_index: int) -> None:
        """Told by the allocator, possibly from autograd's threads, when an allocation fails."""
        if self._stepping:
            return
        for device, pager in self._pagers.items():
            if device.index == device_index:
                self._plan = None
                pager.give_back(pager.sizes()[0])

    def _open(self, device: torch.device) -> Device | None:
        """The means to page on a device; None where there are none."""
        return CudaDevice(device) if device.type == "cuda" else None

    def _pager(self, device: torch.device) -> Pager | None:
        pager = self._pagers.get(device)
        if pager is None and (means := self._open(device)) is not None:
            budget = None if self._device_budget == "auto" else self._device_budget
            pager = self._pagers[device] = Pager(type(self).__name__, means, budget)
            if device.type == "cuda":
                on_out_of_memory(self)
        return pager

    def _state_device(self, param: torch.Tensor, new: bool) -> torch.device:
        if self._pager(param.device) is None:
            return param.device
        self._shown = True
        return torch.device("meta" if new else "cpu")  # made, or moved, when the pages are

    def _step(self) -> None:
        self._stepping = True
        try:
            if self._plan is not None:
                for pager in self._pagers.values():
                    pager.prepare()
            super()._step()
            for pager in self._pagers.values():
                if (lacking := pager.finish()) > 0:
                    self._plan = None
                    pager.give_back(lacking)
        finally:
            self._stepping = False

    def _new_plan(self, work: Sequence[Bucket]) -> StepPlan | None:
        return None if any(pager.streams for pager in self._pagers.values()) else super()._new_plan(work)

    def _prepare(self, work: Sequence[Bucket]) -> None:
        if self._shown:
            self._place()
            self._shown = False
        for pager in self._pagers.values():
            pager.prepare()
            if pager.streams:
                pager.start({id(self.state[param]) for bucket in work for param in bucket.params})

    def _place(self) -> None:
        """Puts states that are in no page into some: new ones, loaded ones, those that others have replaced."""
        waiting: dict[torch.device, list[Entry]] = defaultdict(list)
        settled = set()
        for group in self.param_groups:
            for param in group["params"]:
                state, pager = self.state.get(param), self._pager(param.device)
                if not state or pager is None:
                    continue
                if pager.has(state):
                    settled.add(id(state))
                else:
                    waiting[param.device].append((state, group["blocksize"]))
        for device, pager in self._pagers.items():
            pager.keep_only(settled)
            pager.add(waiting[device])

    def _update(self, work: Sequence[Bucket], verdicts: Mapping[torch.device, Verdict]) -> None:
        """Updates the parameters whose states are on the device, and the others as their pages come along."""
        if not any(pager.streams for pager in self._pagers.values()):
            super()._update(work, verdicts)
            return
        near: list[Bucket] = []
        far: list[Bucket] = []
        for bucket in work:
            pager = self._pagers.get(bucket.step.device)
            paged = [pager is not None and pager.is_paged(self.state[param]) for param in bucket.params]
            for work_there, side in ((near, False), (far, True)):
                if side in paged:
                    work_there.append(bucket.part([i for i, is_paged in enumerate(paged) if is_paged is side]))
        super()._update(near, verdicts)
        parts = _Parts(self, far, verdicts)
        for pager in self._pagers.values():
            pager.run(parts.active, parts.update)
        parts.write_back()

    def _settle(self) -> None:
        self._shown = True
        for pager in self._pagers.values():
            pager.settle()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_device_budget": self._device_budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)


class _Parts:
    """One step of the parameters whose states are on the host, as these come along in pieces."""

    def __init__(
        self, optimizer: PagedAdamW8bit, work: Sequence[Bucket], verdicts: Mapping[torch.device, Verdict]
    ) -> None:
        self._optimizer, self._work, self._verdicts = optimizer, work, verdicts
        self._dense = [dense_parts(bucket.params) for bucket in work]
        self._grads = [gradients(bucket.params) for bucket in work]
        self.active: dict[int, tuple[int, int]] = {}  # by state: the bucket, and the parameter of it
        for number, bucket in enumerate(work):
            for i, param in enumerate(bucket.params):
                self.active[id(optimizer.state[param])] = (number, i)

    def update(self, pieces: list[Piece]) -> None:
        """Updates what the pieces hold, a bucket at a time."""
        found: dict[int, list[tuple[int, int, torch.Tensor, torch.Tensor, State]]] = {}
        for entry, part, views in pieces:
            if id(entry) not in self.active:
                continue
            number, i = self.active[id(entry)]
            param, grad = self._dense[number][i], self._grads[number][i]
            if part.end - part.begin < param.numel():
                param, grad = (tensor.view(-1)[part.begin : part.end] for tensor in (param, grad))
            found.setdefault(number, []).append((i, part.begin, param, grad, entry | views))
        for number, items in found.items():
            indices, begins, params, grads, states = zip(*items)
            bucket = self._work[number].part(indices, begins)._replace(params=list(params))
            self._optimizer._apply(bucket, list(grads), states, self._verdicts[bucket.step.device])

    def write_back(self) -> None:
        for bucket, dense in zip(self._work, self._dense):
            write_back(bucket.params, dense)
