"""Work on tensors that have a shape and no bytes (torch's meta device), in whatever precision a device would do it, and what lives at each
of its moments."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NARROWED = ((F, "linear"), (F, "conv2d"), (torch, "matmul"), (torch, "bmm"), (torch, "baddbmm"))
"""Of what autocast computes in the lower precision, the functions that Stable Diffusion's networks call."""
WIDENED = {"cuda": ((F, "group_norm"), (F, "layer_norm"), (F, "softmax")), "cpu": ()}
"""And of what it computes in fp32 on each kind of device."""


class Ledger(TorchDispatchMode):
    """Notes what lives after every operation that makes a new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.moments: list[int] = []
        self.known: dict[int, int] = {}

    def skip(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that were there before, and are counted elsewhere."""
        for tensor in tensors:
            self.known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.moments.append(self.live)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.live -= self.known.pop(key)


@contextlib.contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """For the time of the block: what torch.autocast casts on a kind of device, kept nowhere. It does not know the meta device, which is twice
    as fast as the fake tensors that it knows. A backward belongs into the block if it computes a forward once more."""
    with contextlib.ExitStack() as stack:
        for place, name in NARROWED:
            stack.enter_context(_replaced(place, name, _casting(getattr(place, name), dtype)))
        for place, name in WIDENED.get(device, ()):
            stack.enter_context(_replaced(place, name, _casting(getattr(place, name), torch.float32)))
        yield


def _casting(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(given: Any) -> Any:
        return given.to(dtype) if isinstance(given, torch.Tensor) and given.is_floating_point() else given

    def casting(*args: Any, **kwargs: Any) -> Any:
        named = {name: cast(given) for name, given in kwargs.items()}
        return function(*[cast(given) for given in reversed(args)][::-1], **named)  # the last first, as torch does

    return casting


def fused_attention() -> contextlib.AbstractContextManager[None]:
    """For the time of the block: the meta device would take attention apart into the matrix that no kernel in use makes."""

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _FusedAttention.apply(query, key, value)

    return _replaced(F, "scaled_dot_product_attention", fused)


@contextlib.contextmanager
def _replaced(place: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    real = getattr(place, name)
    setattr(place, name, by)
    try:
        yield
    finally:
        setattr(place, name, real)


class _FusedAttention(torch.autograd.Function):
    """What every fused attention kernel keeps: its inputs, its output, and one number a row; never the matrix of all pairs."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
