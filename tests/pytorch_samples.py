"""The samples with which PyTorch tests itself. Its testing modules want a package that only its own test classes use, and forbid
what they forbid their own tests: the one is made up, the other undone."""

import sys
import types
import unittest
import warnings

import torch


def load(module: str):
    """A module of torch.testing._internal."""
    if "expecttest" not in sys.modules:
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        __import__(f"torch.testing._internal.{module}")
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return sys.modules[f"torch.testing._internal.{module}"]
