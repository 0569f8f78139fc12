"""Where and with what a branch was computed, beside what a build here would use. Imports no torch.

A key says what a branch was asked to be; bytes also depend on the machine. These circumstances stay out of the key, so
that work finished on a GPU, in shards or by another torch is fresh everywhere; the manifest records them, and a plan
names those that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from quantize.files.threads import thread_count
from quantize.source.processor import decides_bytes, forward_dtype, processor_name, sees_gpu

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "numba", "triton")
"""Whose versions can change bytes."""
Circumstances = Mapping[str, Any]


def circumstances_here(compute_dtype: str, batch_tokens: int, shards: int) -> dict[str, Any]:
    """What a build on this machine would note as ``compute`` and ``versions``, as far as it shows without torch.

    Args:
        compute_dtype, batch_tokens: of the recipe. shards: parts of the calibration windows.
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
    """The same of a manifest's ``compute`` and ``versions``."""
    compute, versions = (part if isinstance(part, Mapping) else {} for part in (compute, versions))
    known = {name: versions[name] for name in PACKAGES if name in versions}
    return {"shards": 1, **compute, **known} if compute else known


def made_otherwise(then: Circumstances, here: Circumstances) -> list[str]:
    """What bytes depend on and both tell of differently, a line each: ``dtype: bfloat16 then, float32 here``."""
    names = [name for name in decides_bytes(then) if name in here]
    return [difference(name, then[name], here[name], "here") for name in sorted(names) if then[name] != here[name]]


def difference(name: str, then: Any, now: Any, when: str = "now") -> str:
    """One line about a circumstance that changed."""
    hint = f" (OMP_NUM_THREADS={then} computes with as many)" if name == "threads" and then else ""
    return f"{name}: {then} then, {now} {when}{hint}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
