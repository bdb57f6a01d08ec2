"""Optimizers: AdamW with 8-bit states, for `torch.optim`'s place in any training loop."""

from peftkern.optim.adamw8bit import AdamW8bit
from peftkern.optim.paging import PagedAdamW8bit

__all__ = ["AdamW8bit", "PagedAdamW8bit"]
