"""Keeping torch.compile out of what it can't compile."""

import functools

import torch

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
