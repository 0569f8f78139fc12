"""How a branch was computed, compared with how a build here would compute it. Imports no torch.

A key describes the requested branch, but the bytes also depend on the machine. These circumstances are not in the key,
so that branches built on a GPU, in shards or with another torch are fresh everywhere; the manifest records them, and a
plan reports those that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from quantize.files.threads import thread_count
from quantize.source.processor import decides_bytes, forward_dtype, processor_name, sees_gpu

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "numba", "triton")
"""Packages whose versions can change the bytes."""
Circumstances = Mapping[str, Any]


def circumstances_here(compute_dtype: str, batch_tokens: int, shards: int) -> dict[str, Any]:
    """What a build on this machine would record as ``compute`` and ``versions``, as far as known without torch.

    Args:
        compute_dtype, batch_tokens: from the recipe. shards: number of parts of the calibration windows.
    """
    device = "cuda" if sees_gpu() else "cpu"
    found: dict[str, Any] = {
        "device": device,
        "dtype": forward_dtype(compute_dtype, device),
        "threads": thread_count(),
        "batch_tokens": batch_tokens,
        "shards": shards,
    }
    if device == "cpu":
        found |= {"kernel": "numba", "processor": processor_name()}
    return found | {name: version for name in PACKAGES if (version := _version(name))}


def circumstances_of(compute: Circumstances, versions: Circumstances) -> dict[str, Any]:
    """The same circumstances from a manifest's ``compute`` and ``versions``."""
    compute, versions = (part if isinstance(part, Mapping) else {} for part in (compute, versions))
    known = {name: versions[name] for name in PACKAGES if name in versions}
    return {"shards": 1, **compute, **known} if compute else known


def made_otherwise(then: Circumstances, here: Circumstances) -> list[str]:
    """Differences in circumstances that affect the bytes, one line each: ``dtype: bfloat16 then, float32 here``."""
    names = [name for name in decides_bytes(then) if name in here]
    return [difference(name, then[name], here[name], "here") for name in sorted(names) if then[name] != here[name]]


def difference(name: str, then: Any, now: Any, when: str = "now") -> str:
    """One line about a circumstance that changed."""
    hint = f" (set OMP_NUM_THREADS={then} for the same number)" if name == "threads" and then else ""
    return f"{name}: {then} then, {now} {when}{hint}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
