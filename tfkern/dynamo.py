"""Keeping torch.compile out of what it can't compile, and its backward from drawing other random bits than its forward."""

import contextlib
import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy

from tfkern import compat


def uncompiled(function):
    """`function` for torch.compile to leave alone: what it keeps between calls is nothing to guard on.

    As torch.compiler.disable, but that imports Dynamo, and with it Triton, which no one needs who compiles nothing.
    """
    disabled = None

    @functools.wraps(function)
    def run(*args, **kwargs):
        nonlocal disabled
        if not compat.dynamo_imported():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run


@contextlib.contextmanager
def drawn_once():
    """Random operations that are traced within give forward and backward the same bits, whatever the partitioner recomputes.

    It may recompute what is random, too (with an activation_memory_budget below 1; PyTorch's own dropout then has other bits in
    the backward). Marked as checkpointing marks what it saves, the bits are saved. A budget of 0 saves nothing that was
    computed: there the mark asks for a replay, for which PyTorch saves the state of the generator.
    """
    meta = compat.current_meta()
    before = meta.get("recompute")
    replayed = compat.activation_memory_budget() == 0 and compat.traces_backward()
    meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE if replayed else CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        if before is None:
            del meta["recompute"]
        else:
            meta["recompute"] = before
