"""Statistics saved on disk, so that a later variant needs only its solve and no forward pass.

Each block has a safetensors file and, written after it, a JSON table of its inputs. H is symmetric, so only its panels
up to the diagonal are saved. Both files contain hashes, which are checked at every read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from quantize.calibration.saved_tensors import save_whole
from quantize.calibration.statistics import InputStatistics, panels
from quantize.errors import CalibrationError
from quantize.files.atomic import write_atomically
from quantize.files.sealed import seal, unseal
from quantize.files.space import touch
from quantize.formats.tensor_file import TensorFile
from quantize.source.linear import Linear

SAMPLE = "entered"


class StatisticsStore:
    """The statistics of one source on one calibration text, in one folder.

    Args:
        folder: named by the key of everything that the statistics depend on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, index: int) -> bool:
        """Whether block ``index`` is saved."""
        return self._table(index).is_file()

    def is_complete(self, blocks: int) -> bool:
        """Whether all blocks are saved."""
        return all(map(self.has, range(blocks)))

    def write(self, index: int, groups: Sequence[InputStatistics], sample: torch.Tensor | None = None) -> None:
        """Save a block's statistics atomically.

        Args:
            groups: finished statistics. sample: a batch of the block's input, [batch, length, width], for the first
                block of its kind (AWQ uses it to find folds).

        Raises:
            OSError: they cannot be written.
        """
        tensors, described = {}, []
        for number, group in enumerate(groups):
            size = group.hessian.shape[0]
            for first, last in panels(size):
                tensors[f"{number}.{first}"] = group.hessian[first:last, :last].cpu()
            described.append({"linears": [one.local for one in group.linears], "size": size, "tokens": group.tokens})
        if sample is not None:
            tensors[SAMPLE] = sample.cpu()
        save_whole(self._file(index), tensors)
        write_atomically(self._table(index), seal(described))

    def read(
        self, index: int, linears: Sequence[Linear], device: torch.device
    ) -> tuple[list[InputStatistics], torch.Tensor | None]:
        """Load a block's statistics for its ``linears``, and the sample of its input if there is one.

        Raises:
            CalibrationError: the file is damaged, or belongs to another block.
        """
        by_name = {linear.local: linear for linear in linears}
        groups = []
        try:
            file = TensorFile.guarded(self._file(index))
            for number, entry in enumerate(unseal(self._table(index).read_bytes())):
                size = entry["size"]
                hessian = torch.empty(size, size, device=device)
                for first, last in panels(size):
                    hessian[first:last, :last] = file.read(f"{number}.{first}")
                members = [by_name.pop(name) for name in entry["linears"]]
                group = InputStatistics(members, hessian, tokens=entry["tokens"])
                group.finish()
                groups.append(group)
            sample = file.read(SAMPLE).to(device) if SAMPLE in file else None
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CalibrationError(self._damaged(index, str(error))) from None
        if by_name:
            raise CalibrationError(self._damaged(index, f"{min(by_name)} is missing"))
        touch(self.folder)
        return groups, sample

    def _damaged(self, index: int, why: str) -> str:
        return (
            f"{self._file(index)}: the saved statistics cannot be read ({why}); remove them with "
            "'quantize gc --part statistics --older-than 0' and build again"
        )

    def _table(self, index: int) -> Path:
        return self.folder / f"{index:05d}.table"

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"
