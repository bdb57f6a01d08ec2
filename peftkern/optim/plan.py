"""A step like the last one: what AdamW8bit keeps from step to step, so that a GPU does not wait for Python.

A step over some hundred tensors costs more in Python than on the GPU: lists of gradients and states, and a boxed tensor
for each of them. `peftkern._host.OptimizerPlan` holds the pointers of parameters and states in a table, reads the
gradients' anew and says whether anything else has changed; then the usual way is gone again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from peftkern.ops._frozen_weight import is_sharded
from peftkern.ops.adamw8bit.function import HAS_TABLES, code_tables
from peftkern.optim.state import MOMENTS, QMAPS, SCALES, is_quantized
from peftkern.optim.update import Bucket, rounding_seed
from peftkern.optim.verdict import reads_gradients, scaler_numbers

if TYPE_CHECKING:
    from peftkern.optim.adamw8bit import AdamW8bit

try:
    from peftkern._host import OptimizerPlan
except ImportError:
    OptimizerPlan = None

_ops = torch.ops.peftkern
_COLUMNS = 8


class StepPlan:
    """One step's calls, for an optimizer whose parameters are 8-bit, contiguous and on one GPU."""

    @staticmethod
    def of(optimizer: AdamW8bit, work: Sequence[Bucket]) -> StepPlan | None:
        """The plan of a step with this work, or None where there can be none."""
        if not HAS_TABLES or OptimizerPlan is None or not work:
            return None
        device = work[0].step.device
        if device.type != "cuda" or any(bucket.step.device != device for bucket in work):
            return None
        states = optimizer.state
        if not all(is_quantized(states[bucket.params[0]]) for bucket in work):
            return None
        if any(is_sharded(param) for bucket in work for param in bucket.params):
            return None
        try:
            return StepPlan(optimizer, work, device)
        except ValueError:  # a tensor of a layout that the table cannot hold
            return None

    def __init__(self, optimizer: AdamW8bit, work: Sequence[Bucket], device: torch.device) -> None:
        states = optimizer.state
        rows = [(param, states[param]) for bucket in work for param in bucket.params]
        self._count, self._device = len(rows), device
        self._table = torch.zeros((self._count, _COLUMNS), dtype=torch.int64)
        groups = [group["params"] for group in optimizer.param_groups]
        names = (*MOMENTS, *SCALES)
        self._host = OptimizerPlan(groups, states, rows, names, self._table.data_ptr())
        self._complete = self._count == sum(map(len, groups))
        places = {id(group): place for place, group in enumerate(optimizer.param_groups)}
        self._calls = []  # place of the group, its blocksize, step count, first row, rows, code books
        first = 0
        for group, step, params, *_ in work:
            books = tuple(states[params[0]][name] for name in QMAPS)
            self._calls.append((places[id(group)], group["blocksize"], step, first, len(params), books))
            first += len(params)
        self._steps = list({id(bucket.step): bucket.step for bucket in work}.values())

    def step(self, optimizer: AdamW8bit) -> bool:
        """Makes the step. False, with nothing done, where the plan no longer fits; the optimizer then drops it."""
        groups = optimizer.param_groups
        lists = [group["params"] for group in groups]
        if not self._host.refresh(lists, optimizer.state):
            return False
        if any(groups[place]["blocksize"] != blocksize for place, blocksize, *_ in self._calls):
            return False
        known, scale = scaler_numbers(optimizer, self._device)
        flag, norm_memory = optimizer._verdict_memory(self._device)
        norm = None if optimizer.max_norm is None else norm_memory
        looked = self._count if reads_gradients(optimizer) else 0
        counter = optimizer._skip_counter(self._device)
        _ops.adamw8bit_found_inf_table_(self._table, looked, scale, known, flag, norm, self._steps, counter)
        for place, (index, blocksize, step, first, count, books) in enumerate(self._calls):
            group = groups[index]
            lr = group["lr"]
            on_device = isinstance(lr, torch.Tensor) and lr.device == self._device
            tables = code_tables(*books)
            if tables is None:
                tables = _ops.adamw8bit_code_tables(*books)
            _ops.adamw8bit_step_table_(
                self._table,
                first,
                count,
                tables,
                0.0 if on_device else float(lr),
                lr if on_device else None,
                step,
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                blocksize,
                scale,
                flag,
                group["maximize"],
                optimizer.max_norm or 0.0,
                norm,
                rounding_seed(group, place),
            )
        for params in lists:
            # Those without a gradient were not written.
            written = params if self._complete else [param for param in params if param.grad is not None]
            torch.autograd.graph.increment_version(written)
        return True
