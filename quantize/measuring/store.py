"""What a measurement keeps on disk: the source's last hidden states, and everything if it is interrupted.

The source's log-probabilities follow from its last hidden states by one product with the head, which is a hundred
times smaller to keep than they are. Each tensor carries a hash, which is looked at when it is read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from quantize.calibration.saved_tensors import save_whole
from quantize.files.cache import cache_folder
from quantize.files.space import touch
from quantize.formats.tensor_file import TensorFile

INTERIM_SECONDS = 60.0


class Store:
    """Files of one measurement in the cache.

    Args:
        source_key: what the source's outputs depend on. key: what the whole measurement depends on.
    """

    def __init__(self, source_key: str, key: str) -> None:
        folder = cache_folder() / "measure"
        self._source, self._interim = folder / f"{source_key[:32]}.safetensors", folder / f"{key[:32]}-interim"
        self._last = time.monotonic()
        self._kept = _read(self._source)
        if self._kept:
            touch(self._source)

    @property
    def has_source(self) -> bool:
        """Whether the source's outputs are known already."""
        return bool(self._kept)

    def resume(self) -> tuple[int, dict[str, torch.Tensor]]:
        """The block to resume at, and the states that enter it; the source's last ones where they are known."""
        files = sorted(self._interim.glob("*.safetensors")) if self._interim.is_dir() else []
        for file in reversed(files):
            states = _read(file)
            if states:
                return int(file.stem), states | self._kept
        return 0, dict(self._kept)

    def interim(self, index: int, states: Mapping[str, torch.Tensor]) -> None:
        """Keep the states that enter block ``index``, at most once a minute."""
        if time.monotonic() - self._last < INTERIM_SECONDS:
            return
        save_whole(self._interim / f"{index:05d}.safetensors", states)
        for file in self._interim.glob("*.safetensors"):
            if int(file.stem) < index:
                file.unlink()
        self._last = time.monotonic()

    def keep_source(self, states: Mapping[str, torch.Tensor]) -> None:
        """Keep the source's last states for the next measurement on the same text."""
        if not self._kept:
            save_whole(self._source, states)

    def done(self) -> None:
        """The measurement is through: nothing interim is needed any more."""
        for file in self._interim.glob("*"):
            file.unlink()
        if self._interim.is_dir():
            self._interim.rmdir()


def _read(path: Path) -> dict[str, torch.Tensor]:
    """States by name; empty where there are none, or not those that were written: they are computed again then."""
    try:
        file = TensorFile.guarded(path)
        return {name: file.read(name) for name in file.names}
    except (OSError, ValueError, KeyError):
        return {}
