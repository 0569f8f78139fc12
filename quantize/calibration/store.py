"""Statistics kept on disk: with them a later variant needs no forward pass, only its solve.

A block is a safetensors file and, written after it, a JSON table of its inputs. H is symmetric, so only its panels up
to the diagonal are kept, as they were summed. Both carry hashes, which are looked at whenever they are read.
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
from quantize.source.streamed import Linear

ENTERED = "entered"


class StatisticsStore:
    """The statistics of one source on one calibration text, in one folder.

    Args:
        folder: named by the key of all that the statistics depend on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, index: int) -> bool:
        """Whether block ``index`` is there."""
        return self._table(index).is_file()

    def is_complete(self, blocks: int) -> bool:
        """Whether all blocks are there."""
        return all(map(self.has, range(blocks)))

    def write(self, index: int, groups: Sequence[InputStatistics], entered: torch.Tensor | None = None) -> None:
        """Keep a block's statistics, whole or not at all.

        Args:
            groups: finished. entered: a batch of what entered the block, [batch, length, width], where it is the
                first of its kind (AWQ finds out from it what takes a scale).

        Raises:
            OSError: no space.
        """
        tensors, described = {}, []
        for number, group in enumerate(groups):
            size = group.hessian.shape[0]
            for first, last in panels(size):
                tensors[f"{number}.{first}"] = group.hessian[first:last, :last].cpu()
            described.append({"linears": [one.local for one in group.linears], "size": size, "tokens": group.tokens})
        if entered is not None:
            tensors[ENTERED] = entered.cpu()
        save_whole(self._file(index), tensors)
        write_atomically(self._table(index), seal(described))

    def read(
        self, index: int, linears: Sequence[Linear], device: torch.device
    ) -> tuple[list[InputStatistics], torch.Tensor | None]:
        """A block's statistics for its loaded ``linears``, and what entered it where that was kept.

        Raises:
            CalibrationError: the file is damaged, or of another block.
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
            entered = file.read(ENTERED).to(device) if ENTERED in file else None
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CalibrationError(self._damaged(index, str(error))) from None
        if by_name:
            raise CalibrationError(self._damaged(index, f"{min(by_name)} is not in them"))
        touch(self.folder)
        return groups, entered

    def _damaged(self, index: int, why: str) -> str:
        return (
            f"{self._file(index)}: the kept statistics cannot be read ({why}); remove them with "
            "'quantize gc --part statistics --older-than 0' and build again"
        )

    def _table(self, index: int) -> Path:
        return self.folder / f"{index:05d}.table"

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"
