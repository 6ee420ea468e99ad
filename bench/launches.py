"""Which of our kernels a call launches, and the tiles that each was compiled for."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

from tfkern.launch import Launch


@contextlib.contextmanager
def watched(instead: Callable | None = None) -> Iterator[list[Launch]]:
    """The launches made within the block, in order. `instead` takes the place of Launch.__call__."""
    seen, original = [], instead or Launch.__call__

    def noted(self, *features, **tensors):
        seen.append(self)
        return original(self, *features, **tensors)

    with mock.patch.object(Launch, "__call__", noted):
        yield seen


def name(launch: Launch) -> str:
    """A kernel with its tiles: "flash_fwd 128x64 w4 s2" has block_m x block_n, warps and stages, and tma if it gets
    descriptors. One for Hopper, as "flash_fwd_short 3x64 s11", has its consumers x the rows that stream past them, and stages;
    "flash_bwd 6,2" has the slots for tiles of queries, and buffers of dS."""
    kernel, has = launch.kernel.__name__, launch.constants
    if "RING" in has:
        return f"{kernel} {has['TILES']},{has['RING']}"
    if "CONSUMERS" in has:
        streamed = has["BLOCK_M"] if kernel.endswith("dkdv") else has["BLOCK_N"]
        return f"{kernel} {has['CONSUMERS']}x{streamed} s{has['STAGES']}"
    options = launch.options
    described = " tma" if launch.blocks else ""
    return f"{kernel} {has['BLOCK_M']}x{has['BLOCK_N']} w{options['num_warps']} s{options['num_stages']}{described}"
