"""What PyTorch tells of its own contract: its errors, and the samples with which it tests itself.

Its testing modules want a package that only its own test classes use, and forbid what they forbid their own tests: the one is
made up, the other undone.
"""

import importlib
import sys
import types
import unittest
import warnings

import pytest
import torch


def assert_same_type_of_error(call, ours, theirs) -> None:
    """call(theirs) raises, and call(ours) raises just that type."""
    with pytest.raises(Exception) as wanted:  # noqa: PT011
        call(theirs)
    with pytest.raises(wanted.type) as found:
        call(ours)
    assert found.type is wanted.type
    assert str(found.value)


def load(module: str):
    """A module of torch.testing._internal."""
    made_up = types.SimpleNamespace(TestCase=unittest.TestCase)
    known = sys.modules.setdefault("expecttest", made_up)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = importlib.import_module(f"torch.testing._internal.{module}")
    if known is made_up:
        del sys.modules["expecttest"]
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return loaded
