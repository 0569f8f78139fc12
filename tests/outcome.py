"""What the tests of the command line look at afterwards: a refusal, and the bytes in a folder."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path


def assert_refused(result: subprocess.CompletedProcess[str], *words: object, code: int = 2) -> None:
    """The exit code (2: wrong input, 1: failed while working) and exactly one error line, which holds all ``words``."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], "something was said after the error"
    assert [word for word in words if str(word) not in errors[0]] == [], errors[0]


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones too, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
