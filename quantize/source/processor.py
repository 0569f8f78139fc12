"""The machine's processor, and whether torch will find a GPU. Imports no torch."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

WIDEST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")


def processor_name() -> str:
    """Architecture, vendor and widest instructions, which affect the last bits: ``x86_64 GenuineIntel avx512f``."""
    vendor, flags = "", set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                vendor = value.strip() if name.strip() == "vendor_id" else vendor
                if name.strip() in {"flags", "Features"}:
                    flags = set(value.split())
                    break
    except OSError:
        pass  # not Linux
    widest = next((name for name in WIDEST if name in flags), "")
    return " ".join(filter(None, (platform.machine(), vendor, widest)))


def sees_gpu() -> bool:
    """Whether the installed torch will find a CUDA device."""
    try:
        if metadata.version("torch").endswith("+cpu"):
            return False
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError, metadata.PackageNotFoundError):
        return False


def forward_dtype(asked: str, device: str) -> str:
    """The dtype of the forward pass on ``cpu`` or ``cuda`` for a recipe's choice, which may be ``auto``.

    ``auto`` is float32 on every CPU, so that all CPUs build the same and because the largest activations of some
    models need more than bfloat16's 8 bits; on a GPU it is bfloat16.
    """
    return asked if asked != "auto" else "bfloat16" if device == "cuda" else "float32"


def decides_bytes(compute: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a manifest's ``compute`` that affect the bytes. The number of threads does so only if a CPU runs
    the forward pass in a dtype other than float32."""
    independent = compute.get("dtype") == "float32" or compute.get("device") != "cpu"
    return {name: value for name, value in compute.items() if not (independent and name == "threads")}
