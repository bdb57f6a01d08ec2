"""PagedAdamW8bit: AdamW8bit with a budget for the device memory of its states."""

from __future__ import annotations

from typing import Any, Literal

from peftkern.optim.adamw8bit import AdamW8bit

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
    """AdamW8bit under the name and with the state format of the paged optimizer.

    `device_budget` is accepted, checked and kept, and all states stay where their parameters are, whatever it says: on
    the CPU there is nothing to page, and on a GPU no state is moved to host memory. Checkpoints do not depend on it: a
    state dict of either class loads into the other.

    Args:
        params, lr, betas, eps, weight_decay, and the other options: as for AdamW8bit.
        device_budget: bytes of device memory for states, or "auto".

    Raises:
        ValueError, TypeError: as AdamW8bit, and for a budget that is none.
    """

    def __init__(self, params: Any, *args: Any, device_budget: DeviceBudget = "auto", **options: Any) -> None:
        self._device_budget = check_device_budget(type(self).__name__, device_budget)
        super().__init__(params, *args, **options)

    @property
    def device_budget(self) -> DeviceBudget:
        """As given to the constructor. It belongs to the machine: checkpoints neither store nor change it."""
        return self._device_budget

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_device_budget": self._device_budget}
