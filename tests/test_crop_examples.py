"""The examples in the docstrings of `mefem crop` run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    ["faces.geometry", "faces.images", "faces.detector", "faces.inputs", "faces.crop"]
    + ["stores.crops", "stores.joining", "stores.tables"],
)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(f"mefem_cli.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
