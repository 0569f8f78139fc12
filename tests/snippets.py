"""Runs what a card tells its readers to run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def run_snippets(card: Path, prelude: str = "") -> None:
    """Execute every Python snippet of a card, few tokens long, each in a process of its own: loaders change theirs."""
    snippets = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        code = prelude + re.sub(r"(max_(?:new_)?tokens)=128", r"\1=4", snippet)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
