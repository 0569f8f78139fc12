"""Quantize the full-width GGUF to levels: exact sizes from llama.cpp's dry run, files from its quantizer."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import GgufError, GgufRunError
from quantize.files.child import Child, ChildFailed, Task
from quantize.gguf.convert import Header
from quantize.gguf.reasons import QUIET, reason_in
from quantize.recipe.levels import LEVELS

BUFFER_BYTES = 64 * 2**20  # of rows buffered by a running quantizer
ALIGNMENT = 32
ANY = "any"
"""Stands for any importance matrix: types depend on whether there is one, not on its content."""

ROW = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[([^\]]*)\], type = +(\w+), (.*)$")
_FALLBACK = re.compile(r"warning: +(\S+) +- ncols")


@dataclass(frozen=True)
class Outcome:
    """How llama.cpp quantizes every tensor at a level.

    Attributes:
        types: GGUF tensor name -> type name.
        fallbacks: tensors of another type than the level's, because their rows do not fill its blocks.
        nbytes: exact size of the whole file.
    """

    types: Mapping[str, str]
    fallbacks: tuple[str, ...]
    nbytes: int


def request(
    level: str,
    source: Path,
    target: Path,
    *,
    threads: int,
    tensor_types: Mapping[str, str] | None = None,
    imatrix: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """The child's request for a level. Paths are absolute, because the child has another working directory.

    Args:
        imatrix: a ``.npz`` of mean squares by tensor name; for a dry run :data:`ANY`.
        metadata: strings and integers to add to the file.
    """
    import gguf

    known = LEVELS[level]
    numbers = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
    wide = numbers["Q8_0"] if known.wide else None
    return {
        "source": os.path.abspath(source),
        "target": os.path.abspath(target),
        "ftype": known.ftype,
        "threads": threads,
        "buffer_bytes": BUFFER_BYTES,
        "dry_run": dry_run,
        "output_type": wide,
        "embedding_type": wide,
        "tensor_types": [[pattern, numbers[kind]] for pattern, kind in (tensor_types or {}).items()],
        "imatrix": ANY if imatrix == ANY else os.path.abspath(imatrix) if imatrix else None,
        "metadata": dict(metadata or {}),
    }


def start(request: Mapping[str, Any]) -> Child:
    """Start the child for a :func:`request`."""
    worker = Path(__file__).with_name("worker_quantize.py")
    return Child(Task(worker, dict(request), variables={"OMP_NUM_THREADS": str(request["threads"]), **QUIET}))


def finish(child: Child, on_line: Callable[[str], None] | None = None) -> tuple[int, str]:
    """Wait for a quantizer.

    Args:
        on_line: called with every line of llama.cpp's log.

    Returns:
        The exit code, negative if a signal ended it, and the end of the log.
    """
    try:
        child.wait(on_line)
    except ChildFailed as error:
        return error.code or 1, error.log
    return 0, child.log


def failure(level: str, code: int, log: str) -> GgufError:
    """The error for a failed level, with llama.cpp's reason."""
    reasons = re.findall(r"failed to quantize: (.*)", log)
    reason = reasons[-1] if reasons else reason_in(log)
    if code < 0 and not reason:
        return GgufRunError(
            f"{level}: llama.cpp's quantizer was killed by signal {-code}; nothing of this level was saved"
        )
    return GgufError(f"{level}: llama.cpp cannot make it: {reason or 'it gave no reason'}")


def predict(requests: Mapping[str, Mapping[str, Any]], header: Header) -> dict[str, Outcome]:
    """Types, fallbacks and exact sizes of levels, from llama.cpp's dry run on the header of the full-width file.

    Args:
        requests: by level, with ``dry_run`` set.

    Raises:
        GgufError: llama.cpp refuses a level.
    """

    def ask(request: Mapping[str, Any]) -> tuple[int, str]:
        lines: list[str] = []  # all of them: with many experts there are more tensors than lines in a child's log
        with start(request) as child:
            code, _ = finish(child, lines.append)
        return code, "".join(lines)

    found = {}
    with ThreadPoolExecutor(min(len(requests), os.cpu_count() or 1) or 1) as pool:
        for level, (code, log) in zip(requests, pool.map(ask, requests.values()), strict=True):
            if code:
                raise failure(level, code, log)
            found[level] = _outcome(log, header, requests[level]["metadata"])
    return found


def _outcome(log: str, header: Header, metadata: Mapping[str, Any]) -> Outcome:
    import gguf

    types, total = {}, 0
    for line in log.splitlines():
        if not (match := ROW.match(line)):
            continue
        name, shape, kind, rest = match.groups()
        if changed := re.search(r"\((\w+)\)\s*$", rest):
            kind = changed[1]
        types[name] = kind.upper()
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[types[name]]]
        total += _padded(math.prod(int(size) for size in shape.split(",")) // block * width)
    fallbacks = tuple(dict.fromkeys(match[1] for match in _FALLBACK.finditer(log)))
    added = {"general.quantization_version": 2, "general.file_type": 1, **metadata}
    own = sum(_entry_bytes(key, value) for key, value in added.items() if key not in header.keys)
    return Outcome(types, fallbacks, total + _padded(header.nbytes + own))


def _entry_bytes(key: str, value: Any) -> int:
    """Size in bytes of a GGUF metadata key with a 32-bit number or a string."""
    return 8 + len(key.encode()) + 4 + (4 if isinstance(value, int) else 8 + len(str(value).encode()[:127]))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
