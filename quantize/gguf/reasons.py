"""llama.cpp's own reason for a failure, found in its log."""

from __future__ import annotations

import re

from quantize.files.child import ChildFailed

QUIET = {"GGML_NO_BACKTRACE": "1"}
"""Environment of its processes: without this it calls a debugger when it aborts, whose lines hide the reason."""
MOST = 300
_PREFIX = re.compile(r"^(?:error loading model[\w ]*: )+")
_PATTERNS = (
    r"(error loading model[\w ]*: .*)$",
    r"((?:GGML_ASSERT|GGML_ABORT)\(.*\) failed.*)$",
    r"^\S*?/?([\w.-]+\.(?:cpp|c|h|cu):\d+: .+)$",
    r"failed to quantize: (.*)$",
    r"((?:failed to|unable to|cannot|unknown|missing|invalid)\b.*)$",
)


def reason_in(log: str) -> str | None:
    """The line of llama.cpp's log that says why it failed, without the function's name; None if there is none."""
    for pattern in _PATTERNS:
        if found := re.findall(pattern, log, re.MULTILINE):
            # the first is the cause of those that follow
            return _PREFIX.sub("", found[0]).strip()[:MOST]
    return None


def reason_of(error: ChildFailed) -> str:
    """Why a child that ran llama.cpp failed."""
    return reason_in(error.log) or error.reason
