"""Hessians of a pass on disk, for what is solved after it: those of the inputs that are asked for, block by block.

Each block has a safetensors file with the panels of each H up to its diagonal and, written after it, a JSON table of
the inputs. Both contain hashes, which are checked at every read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.calibration.saved_tensors import save_whole
from quantize.calibration.statistics import mirror, panels
from quantize.files.atomic import write_atomically
from quantize.files.sealed import seal, unseal
from quantize.formats.tensor_file import TensorFile


@dataclass(frozen=True)
class SavedHessian:
    """One distinct input.

    Attributes:
        linears: names in the checkpoint of the linears that read it. tokens: how many it is of.
    """

    linears: tuple[str, ...]
    size: int
    tokens: int
    _file: TensorFile
    _number: int

    def read(self, device: torch.device) -> torch.Tensor:
        """X^T X, float32 [size, size].

        Raises:
            OSError, ValueError, KeyError: the file is damaged.
        """
        hessian = torch.empty(self.size, self.size)
        for first, last in panels(self.size):
            hessian[first:last, :last] = self._file.read(f"{self._number}.{first}")
        mirror(hessian)
        return hessian.to(device)


class HessianFiles:
    """Hessians in one folder, which may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, index: int, inputs: Sequence[tuple[Sequence[str], torch.Tensor, int]]) -> None:
        """Save a block's: for each input the names of its linears, H [K, K] and its tokens.

        Raises:
            OSError: they cannot be written.
        """
        tensors, described = {}, []
        for number, (linears, hessian, tokens) in enumerate(inputs):
            size = hessian.shape[0]
            for first, last in panels(size):
                tensors[f"{number}.{first}"] = hessian[first:last, :last].cpu()
            described.append({"linears": list(linears), "size": size, "tokens": tokens})
        save_whole(self._file(index), tensors)
        write_atomically(self._table(index), seal(described))

    def inputs(self, index: int) -> Iterator[SavedHessian]:
        """A block's inputs, whose Hessians are read one at a time.

        Raises:
            OSError, ValueError, KeyError: the files are not there, or are damaged.
        """
        table = unseal(self._table(index).read_bytes())
        file = TensorFile.guarded(self._file(index)) if table else None
        for number, entry in enumerate(table):
            assert file is not None
            yield SavedHessian(tuple(entry["linears"]), entry["size"], entry["tokens"], file, number)

    def _table(self, index: int) -> Path:
        return self._folder / f"{index:05d}.table"

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:05d}.safetensors"
