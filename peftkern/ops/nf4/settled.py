"""Whether a quantized weight has been left alone since an earlier multiplication."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch


class Settled:
    """Watches the tensors of one weight: `check` is True once they have been seen before and not been written since.

    A kernel may then read the weight while the kernels queued before it still run: the one that wrote it has ended,
    because the multiplication that saw it first waited for everything before itself. Writes count as PyTorch counts
    them (`Tensor._version`): in-place operations do, those on `tensor.data` do not.
    """

    __slots__ = ("_tensors", "_versions")

    def __init__(self) -> None:
        self._tensors: tuple[weakref.ref[torch.Tensor], ...] = ()
        self._versions = -1

    def check(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Whether these tensors had settled the time before; remembers them. False in doubt.

        Call it where a multiplication is queued, and only there: not while compiling, not for an empty x.
        """
        present = [t for t in tensors if t is not None]
        try:
            versions = sum([t._version for t in present])
        except RuntimeError:  # inference tensors count no versions
            return False
        seen = self._tensors
        if (
            versions == self._versions
            and len(seen) == len(present)
            and all(ref() is t for ref, t in zip(seen, present))
        ):
            return True
        self._tensors, self._versions = tuple(map(weakref.ref, present)), versions
        return False

    def __reduce__(self) -> tuple[type[Settled], tuple[()]]:
        return Settled, ()  # a copy has settled nothing
