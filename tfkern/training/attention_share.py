"""How much of a training step is spent in attention, forward and backward.

A pair of identity Functions stands around the call of the attention while it is measured: what runs between them, in either
direction, is attention. On a GPU the time is that of its stream, between events recorded there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Clock:
    """Marks on a device's time line, and the stretches between pairs of them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: list[tuple] = []
        self.begun = None

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.begun = self.mark()

    def stop(self) -> None:
        self.spans.append((self.begun, self.mark()))

    def between(self, first, last) -> float:
        """Their distance, in one unit for all."""
        return first.elapsed_time(last) if self.cuda else last - first


class Watch:
    """An attention function that passes calls through, and measures them within `measuring`."""

    def __init__(self, attention: Callable[..., Tensor]):
        self.attention, self.clock = attention, None
        self.share: float | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *more, **options) -> Tensor:
        if self.clock is None:
            return self.attention(query, key, value, *more, **options)
        query, key, value = _Enter.apply(self.clock, query, key, value)
        return _Leave.apply(self.clock, self.attention(query, key, value, *more, **options))

    @contextlib.contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """Within the block is one training step. Afterwards `share` is that of attention in its time, None without any."""
        self.clock = clock = Clock(device)
        start = clock.mark()
        try:
            yield
        finally:
            self.clock = None
        end = clock.mark()
        if clock.cuda:
            torch.cuda.synchronize(device)
        inside = sum(clock.between(*span) for span in clock.spans)
        self.share = inside / clock.between(start, end) if clock.spans else None


class _Enter(torch.autograd.Function):
    """Before attention, and after its backward."""

    @staticmethod
    def forward(ctx, clock: Clock, *tensors: Tensor):
        ctx.clock = clock
        views = tuple(x.view_as(x) for x in tensors)
        clock.start()
        return views

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.clock.stop()
        return None, *grads


class _Leave(torch.autograd.Function):
    """After attention, and before its backward."""

    @staticmethod
    def forward(ctx, clock: Clock, out: Tensor):
        clock.stop()
        ctx.clock = clock
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.clock.start()
        return None, grad
