"""Real text for the data tests: source files of the standard library, one document each."""

import argparse
import difflib
import inspect
import textwrap

import pytest


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Real text with line breaks and indentation, about 250 kB."""
    return [inspect.getsource(m) for m in (argparse, difflib, textwrap, inspect)]
