"""`import dsv2` is cheap, and its public names are there all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dsv2

HEAVY = ("torch", "numpy", "tokenizers", "safetensors", "transformers", "matplotlib", "rich", "typer")


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, dsv2; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", dsv2.__all__)
def test_every_public_name_resolves(name):
    assert getattr(dsv2, name) is not None
    assert name in dir(dsv2)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsv2.nothing  # type: ignore[attr-defined]
