"""Settings that make this process compute reproducible bytes, and a description of how it computes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from quantize.files.cache import cache_folder
from quantize.files.threads import VARIABLE, thread_count
from quantize.methods.products import EvenProducts
from quantize.source.processor import processor_name

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def settled(threads: int | None = None) -> Iterator[None]:
    """Context in which this process computes reproducibly; on exit the caller's settings are restored.

    Torch, the compiled kernels and child processes use the same number of threads. float32 products are computed in
    full float32, independent of that number. The default dtype is float32 and the default device the CPU.

    Args:
        threads: number of threads; None means :func:`thread_count`, or torch's present number if that is smaller.
    """
    before = torch.get_num_threads()
    if threads is None:
        threads = thread_count() if os.environ.get(VARIABLE) else min(thread_count(), before)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        stack.enter_context(_environment(threads))
        stack.enter_context(_settings())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(EvenProducts())  # type: ignore[no-untyped-call]
        torch.set_num_threads(threads)
        yield


def compute_of(device: torch.device, dtype: torch.dtype, kernel: str) -> dict[str, Any]:
    """Description of how this process computes, for the manifest."""
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
    }


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Set environment variables that libraries read at start-up and child processes inherit."""
    wanted = {
        VARIABLE: str(threads),
        # cuBLAS is deterministic with a fixed workspace, whose size it reads at start-up
        CUBLAS: os.environ.get(CUBLAS, ":4096:8"),
        # compiled kernels go into our cache, because the package folder may be read-only
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(cache_folder() / "numba")),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    _reread_by_numba()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread_by_numba()


def _reread_by_numba() -> None:
    """Update numba's cache folder, which numba reads from the environment only when it is imported."""
    if numba := sys.modules.get("numba"):
        numba.config.CACHE_DIR = os.environ.get("NUMBA_CACHE_DIR", "")


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Set torch's process-wide settings. On a GPU, operations without a deterministic version give a warning."""
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    repeatable = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    memory.fill_uninitialized_memory = False  # nothing here reads uninitialized memory
    try:
        with _full_precision():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(repeatable, warn_only=warns)
        memory.fill_uninitialized_memory = filled
        torch.set_rng_state(state)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products in float32, also on a CPU: reduced-precision products keep 8 or 10 bits of each factor,
    so that X^T X would no longer be the Hessian of X."""
    backends: Any = torch.backends
    switches = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul, backends.cudnn.conv]
    switches = [one for one in switches if hasattr(one, "fp32_precision")]
    before = [one.fp32_precision for one in switches]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has used torch's older switches
        precision = None
    torch.set_float32_matmul_precision("highest")
    for one in switches:
        one.fp32_precision = "ieee"
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for one, value in zip(switches, before, strict=True):
            one.fp32_precision = value
