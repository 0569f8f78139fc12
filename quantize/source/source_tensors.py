"""Read a source's tensors by name, each checked against its hash from planning."""

from __future__ import annotations

import torch

from quantize.errors import SourceError
from quantize.files.digest import identity_of
from quantize.formats.tensor_file import NotAsWritten, TensorFile
from quantize.source.dequantize import read_float8
from quantize.source.fingerprints import note_tensor
from quantize.source.resolved import Source
from quantize.source.stacked import StackedTensors
from quantize.source.unchanged import changed


class SourceTensors:
    """Reads tensors of a source with local weights. May be used by several threads."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[str, TensorFile] = {}
        self._stacked = StackedTensors(self._read)

    def __contains__(self, name: str) -> bool:
        return name in self._source.checkpoint.tensors

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, a slice of one, or a float8 one as bfloat16.

        Raises:
            SourceChanged: it differs from its hash. SourceError: its file can no longer be read.
        """
        one = self._source.checkpoint.slices.get(name)
        return self._read(name) if one is None else self._stacked.take(one)

    def _read(self, name: str) -> torch.Tensor:
        one = self._source.checkpoint.float8.get(name)
        return self._stored(name) if one is None else read_float8(name, one, self._stored)

    def _stored(self, name: str) -> torch.Tensor:
        shard = self._source.checkpoint.in_headers[name].file
        path, whole = self._source.folder / shard, self._source.fingerprints[shard]
        try:
            identity = identity_of(path.resolve())
            if shard not in self._files:
                self._files[shard] = TensorFile(path, whole.tensors)
            tensor = self._files[shard].read(name)
        except NotAsWritten:
            raise changed(path, name) from None
        except (OSError, KeyError, ValueError) as error:
            raise SourceError(f"{path}: cannot read {name}: {error}") from None
        note_tensor(identity, name, whole)
        return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    # min and max propagate NaN and infinity and need no temporary of the tensor's size
    low, high = torch.aminmax(tensor.reshape(-1)) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) & torch.isfinite(high))
