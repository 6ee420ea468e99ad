"""Keeping torch.compile out of what it can't compile, and its backward from drawing other random bits than its forward."""

import contextlib
import functools

import torch
from torch.fx import traceback
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
    meta = traceback.get_current_meta()
    before = meta.get("recompute")
    budget = meta.get("custom", {}).get("_region_activation_memory_budget", compat.activation_memory_budget())
    replayed = budget == 0 and _with_backward()
    meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE if replayed else CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        if before is None:
            del meta["recompute"]
        else:
            meta["recompute"] = before


def _with_backward() -> bool:
    """Whether the graph that is being traced is a forward with its backward, as partitioners get it and know it."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return mode is not None and any("tangents" in x.target for x in mode.tracer.graph.find_nodes(op="placeholder"))
