"""Tensors that grow by rows: (B, S, width), of which a part is in use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

SPARE = 256
"""Rows by which a sliding cache is longer than its window, so that its rows are moved once in that many steps."""


class Rows:
    """The memory of a cache: some tensors (B, capacity, width) and one range of rows that is in use in all of them.

    New rows are written behind that range; :meth:`commit` makes them part of it, so that a step that fails leaves
    everything as it was.

    Args:
        limit: number of rows to allocate at once, beyond which nothing fits; None: the memory grows.
        window: how many rows of the past are ever looked at again; None: all.
        extra: rows more than that to keep, for :meth:`drop_last`.
    """

    def __init__(self, limit: int | None, window: int | None, extra: int) -> None:
        self.limit, self.window, self.extra = limit, window, extra
        self.tensors: dict[str, Tensor] = {}
        self.replaced: frozenset[str] = frozenset()
        """Tensors that hold, since the last commit, just what is in use and what was written."""
        self.first = self.last = 0
        self.lent = False
        """Whether the tensors are the caller's, who may go on reading them: nothing is written into these."""

    @property
    def count(self) -> int:
        """Rows in use."""
        return self.last - self.first

    @property
    def capacity(self) -> int:
        """Rows that are allocated."""
        return next((x.shape[1] for x in self.tensors.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def used(self, name: str, ahead: int = 0) -> Tensor:
        """The rows of a tensor that are in use, and ``ahead`` more that were written behind them; a view."""
        if name in self.replaced:
            return self.tensors[name]
        return self.tensors[name][:, self.first : self.last + ahead]

    def read(self, name: str, ahead: int = 0) -> Tensor:
        """The rows in use as numbers; here what is stored."""
        return self.used(name, ahead)

    def names(self, streams: tuple[str, ...]) -> tuple[str, ...]:
        """The tensors that hold those streams; here they are the streams."""
        return streams

    def borrow(self, tensors: dict[str, Tensor], count: int) -> None:
        """Read the caller's tensors, all rows of which are in use, until the next ones are written."""
        self.tensors, self.last, self.lent = tensors, count, True

    def stored(self, name: str, ahead: int = 0) -> tuple[Tensor, Tensor | None]:
        """The rows in use as they are stored, and the scales of their heads where they are codes; views."""
        return self.used(name, ahead), None

    def write(self, name: str, new: Tensor) -> None:
        """``new`` (B, L, width) behind the rows in use."""
        self._make_ordinary()
        L = new.shape[1]
        held = self.tensors.get(name)
        if self._by_new_tensors():
            old = new[:, :0] if held is None else self.used(name)[:, self._dropped() :]
            self.hold(name, torch.cat([old, new], dim=1))
            self.replaced = self.replaced | {name}
            return
        if held is None:
            # As long as the tensors that are there: what is wanted beyond them would double with each one.
            rows = self.capacity if self.capacity >= self.last + L else self._wanted(L)
            held = self.hold(name, self._allocate(new, rows))
        elif self._is_unfit(L):
            self._make_room(L)
            held = self.tensors[name]
        held[:, self.last : self.last + L] = new

    def holds(self, widths: Mapping[str, int], dtype: torch.dtype) -> bool:
        """Whether there are rows of all these tensors, of their widths, that stand for numbers of that type."""
        tensors = self.tensors
        return all(
            name in tensors and tensors[name].dtype == dtype and tensors[name].shape[2] == width
            for name, width in widths.items()
        )

    def reserve(self, L: int) -> None:
        """Room for ``L`` rows behind those in use, for :meth:`stored` to show and others to write."""
        if self._is_unfit(L):
            self._make_room(L)

    def commit(self, L: int) -> None:
        """The ``L`` rows that were written are in use from now on."""
        if self._by_new_tensors():
            self.first, self.last, self.replaced = 0, self.count - self._dropped() + L, frozenset()
        else:
            self.last += L

    def drop_last(self, count: int) -> None:
        """The last ``count`` rows are not in use any more."""
        self.last -= count

    def select(self, index_B: Tensor) -> None:
        """Samples ``index_B`` of the batch, in that order, in new memory."""
        with ordinary():
            self.tensors = {name: x.index_select(0, index_B) for name, x in self.tensors.items()}
        self.lent = False

    def branch(self) -> Rows:
        """The same with memory of its own."""
        other = copy.copy(self)
        with ordinary():
            other.tensors = {name: x.clone() for name, x in self.tensors.items()}
        other.lent = False
        return other

    def hold(self, name: str, x: Tensor) -> Tensor:
        """Keep ``x`` as the tensor of that name, and return it."""
        # A new dictionary, because torch.compile does not follow changes of one that came from outside.
        self.tensors = {**self.tensors, name: x}
        return x

    def _by_new_tensors(self) -> bool:
        """Whether tensors are replaced by longer ones: a program's sizes are then plain functions of its inputs'."""
        return torch.compiler.is_compiling() and self.limit is None

    def _dropped(self) -> int:
        """Rows in use that no later query looks at."""
        return 0 if self.window is None else max(0, self.count - (self.window - 1 + self.extra))

    def _is_unfit(self, L: int) -> bool:
        """Whether ``L`` rows do not fit behind those in use, or would in memory that is not ours or far too much."""
        if self.lent or self.last + L > self.capacity:
            return True
        # After many rows at once a window needs less. The full size first, since it is the same in every step.
        return self.window is not None and self.capacity > self._full(self.window) and self.capacity > self._wanted(L)

    def _full(self, window: int) -> int:
        """Rows beyond which a window does not grow for a few new ones: it, what may be dropped, and room to slide."""
        return window + self.extra + SPARE

    def _wanted(self, L: int) -> int:
        """Rows to allocate where ``L`` are to be added."""
        if self.window is None:
            return max(self.last + L, 2 * self.capacity, 64) if self.limit is None else self.limit
        # Without a limit a large window is not allocated before it is filled.
        most = max(2 * self.capacity, 2 * SPARE) if self.limit is None else self.limit
        return max(self.count - self._dropped() + L, min(most, self._full(self.window)))

    def _allocate(self, like: Tensor, rows: int) -> Tensor:
        sizes = (like.shape[0], rows, *like.shape[2:])
        with ordinary():
            return torch.empty(sizes, dtype=like.dtype, device=like.device)

    def _make_ordinary(self) -> None:
        """Copy, outside inference mode, what a compiled program has allocated inside: it could not be written to."""
        # Programs cannot ask for it, and those of torch's own backend write to any memory.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(x.is_inference() for x in self.tensors.values()):
            self.tensors = {name: x.clone() for name, x in self.tensors.items()}

    def _make_room(self, L: int) -> None:
        """Room for ``L`` rows behind those in use: by sliding in a window's full memory, else in new memory."""
        self._make_ordinary()
        if self.window is not None:
            self.first += self._dropped()
            keep = self.count
            if not self.lent and self.capacity == self._wanted(L):
                for x in self.tensors.values():
                    _move_down(x, self.first, keep)
                self.first, self.last = 0, keep
                return
        rows = self._wanted(L)
        for name, x in self.tensors.items():
            self.hold(name, self._allocate(x, rows))[:, : self.count] = x[:, self.first : self.last]
        self.first, self.last, self.lent = 0, self.count, False


def ordinary() -> AbstractContextManager[Any]:
    """Outside inference mode, because what is allocated inside cannot be written to outside."""
    # Of a program the mode in which it is called decides, whatever stands in it: see Rows._make_ordinary.
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _move_down(x: Tensor, start: int, count: int) -> None:
    """Rows ``start`` and following to the beginning, in pieces that do not overlap their destination."""
    for done in range(0, count, max(1, start)):
        piece = min(start, count - done)
        x[:, done : done + piece] = x[:, start + done : start + done + piece]
