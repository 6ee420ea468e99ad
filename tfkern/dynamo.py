"""Decorators for torch.compile: what it must not trace, and random operations whose bits forward and backward share."""

import contextlib
import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy

from tfkern import compat


def uncompiled(function):
    """`function`, which torch.compile doesn't trace: it would put guards on what the function caches between calls.

    Same as torch.compiler.disable, which imports Dynamo, and with it Triton, even if nothing is compiled.
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
    """Random operations traced inside this context have the same bits in forward and backward, whatever the partitioner
    recomputes.

    With an activation_memory_budget below 1 the partitioner recomputes random operations too (PyTorch's own dropout then has
    different bits in the backward). Operations traced here carry the mark of activation checkpointing that saves their result.
    A budget of 0 saves no results: the mark then asks for a replay, for which PyTorch saves the state of the generator.
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
