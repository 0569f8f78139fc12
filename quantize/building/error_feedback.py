"""Error feedback on GGUF levels: the tensors of files that llama.cpp's quantizer wrote, solved in place.

Each distinct input's Hessian, which the pass has saved, serves all tensors that multiply it, and a tensor of one type
is solved once for all levels that have it in that type. A solved payload has the size of the one it replaces, so
headers, offsets and sizes stay. Solved payloads are saved beside the Hessians until all levels are in their places, and
an interrupted build resumes from them.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.building.build import Build, Hessians
from quantize.calibration.forward import choose_device
from quantize.calibration.hessians import HessianFiles, SavedHessian
from quantize.calibration.saved_tensors import save_whole
from quantize.errors import SolveError
from quantize.executors.blocks import BlockFuture, BlockJob, BlockRows, SolvedRows
from quantize.executors.memory import give_back
from quantize.files.digest import key_of
from quantize.formats.gguf_reader import open_gguf
from quantize.formats.tensor_file import TensorFile
from quantize.gguf.convert import Header
from quantize.measuring.gguf import Alignment
from quantize.methods.factor import Damping
from quantize.planning.feedback import FEEDBACK_VERSION, Target
from quantize.planning.items import PlannedLevel
from quantize.planning.keys import SOLVER_VERSION
from quantize.source.source_tensors import SourceTensors

ARRANGED = "the converter changes the linear's inputs or values in a way that is not known"
NO_TOKENS = "no calibration token reached it"
RULES: tuple[Damping, ...] = ("auto", "own", "mean")
SEVERAL = "it is made of linears with different inputs"
Piece = tuple[Target, int]
"""A matrix of a tensor: its tensor, and its place in the stack."""


@dataclass
class Made:
    """A level as llama.cpp's quantizer wrote it, to be solved in place.

    Attributes:
        item: the level. path: its file. places: offset and bytes of each tensor's data.
    """

    item: PlannedLevel
    path: Path
    places: Mapping[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        tensors = open_gguf(self.path).tensors
        self.places = {one.name: (int(one.data_offset), int(one.n_bytes)) for one in tensors}

    def read(self, piece: Piece) -> NDArray[np.uint8]:
        """Bytes of a matrix, uint8 [N, bytes of a row]."""
        offset, nbytes = self._place(piece)
        data = np.fromfile(self.path, dtype=np.uint8, count=nbytes, offset=offset)
        return data.reshape(piece[0].shape[-2], -1)

    def write(self, piece: Piece, data: NDArray[np.uint8]) -> None:
        """Replace the bytes of a matrix; the caller flushes the file."""
        offset, nbytes = self._place(piece)
        if data.nbytes != nbytes:
            raise ValueError(f"{piece[0].name}: {data.nbytes} bytes instead of {nbytes}")
        with self.path.open("rb+", buffering=0) as file:
            view = memoryview(data.tobytes())
            while view:
                count = os.pwrite(file.fileno(), view, offset)
                view, offset = view[count:], offset + count

    def _place(self, piece: Piece) -> tuple[int, int]:
        target, matrix = piece
        offset, nbytes = self.places[target.name]
        each = nbytes // len(target.inputs)
        return offset + matrix * each, each


@dataclass
class _Sum:
    """The result for a tensor: sums over its matrices, and why some of them stay llama.cpp's."""

    before: float = 0.0
    after: float = 0.0
    energy: float = 0.0
    solved: int = 0
    reason: str = ""
    damping: dict[str, Any] = field(default_factory=dict)

    def row(self, target: Target) -> dict[str, Any]:
        """For the manifest."""
        row: dict[str, Any] = {"tensor": target.name, "type": target.kind}
        row["outcome"] = "solved" if self.solved == len(target.inputs) else "partly" if self.solved else "llama.cpp"
        if self.solved and self.energy > 0:
            row["relative_error_before"] = float(f"{self.before / self.energy:.4g}")
            row["relative_error"] = float(f"{self.after / self.energy:.4g}")
        row |= self.damping
        if self.solved < len(target.inputs):
            row["reason"] = self.reason
            if self.solved:
                row["matrices"] = f"{self.solved} of {len(target.inputs)}"
        return row


@dataclass(frozen=True)
class _Rows:
    """Matrices of one type with one input: the bytes of llama.cpp's quantizer, and where solved ones are saved."""

    kind: str
    pieces: list[Piece]
    first: NDArray[np.uint8]
    place: Path


@dataclass(frozen=True)
class _Pending:
    parts: list[_Rows]
    future: BlockFuture


class ErrorFeedback:
    """Solves the tensors of levels.

    Args:
        conversion: the full-width file that the levels are made of. header: what it is made of.
        hessians: those of the pass. levels: as llama.cpp's quantizer wrote them.
    """

    def __init__(
        self, build: Build, conversion: Path, header: Header, hessians: Hessians, levels: Sequence[Made]
    ) -> None:
        self._executor, self._reporter, self._levels = build.executor, build.reporter, levels
        self._saved = saved = hessians.saved
        self._blocks = build.plan.table.blocks
        self._device = choose_device(build.options.device)
        self._transposed = {linear.name: linear.transposed for linear in build.plan.table.linears}
        self._alignment = Alignment(conversion, header.converted, SourceTensors(build.plan.source).read)
        self._files = HessianFiles(saved.hessians)
        self._having: dict[tuple[str, str], list[Made]] = {}  # the levels that have a tensor in a type
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._by_linear: dict[str, list[Piece]] = {}
        for made in levels:
            assert made.item.feedback
            for target in made.item.feedback.targets:
                key = target.name, target.kind
                if key not in self._sums:
                    self._sums[key], self._having[key] = _Sum(), []
                    for matrix, names in enumerate(target.inputs):
                        self._by_linear.setdefault(names[0], []).append((target, matrix))
                self._having[key].append(made)

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Solve everything.

        Returns:
            By level a row for each of its quantized tensors, for the manifest.

        Raises:
            DamagedBuild: a saved Hessian is not what was written. OSError: no space.
        """
        count = sum(map(len, self._by_linear.values()))
        self._reporter.say(f"error feedback on {len(self._sums)} tensors of {len(self._levels)} levels")
        pending: deque[_Pending] = deque()
        with self._reporter.progress("error feedback", count, "matrix") as advance:
            for saved in self._inputs():
                rest = []
                for one in (self._rows_of(kind, pieces) for kind, pieces in self._pieces(saved).items()):
                    if (done := _solved_before(one.place)) is not None:
                        advance(self._take(one, done))
                    else:
                        rest.append(one)
                if rest:
                    pending.append(_Pending(rest, self._begin(saved, rest)))
                while len(pending) >= self._executor.ahead:
                    advance(self._finish(pending.popleft()))
            while pending:
                advance(self._finish(pending.popleft()))
        return {made.item.level: self._rows(made) for made in self._levels}

    def _inputs(self) -> Iterator[SavedHessian]:
        try:
            for index in range(self._blocks):
                yield from self._files.inputs(index)
                self._alignment.conversion.give_back()
                give_back()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._saved.damaged(error) from None

    def _pieces(self, saved: SavedHessian) -> dict[str, list[Piece]]:
        """The matrices that multiply an input, by type."""
        members, found = frozenset(saved.linears), dict[str, list[Piece]]()
        for name in saved.linears:
            for piece in self._by_linear.get(name, ()):
                target, matrix = piece
                if not members.issuperset(target.inputs[matrix]):
                    self._sum(target).reason = SEVERAL
                elif not all(self._keeps_inputs(piece, linear) for linear in target.inputs[matrix]):
                    self._sum(target).reason = ARRANGED
                else:
                    found.setdefault(target.kind, []).append(piece)
        return found

    def _keeps_inputs(self, piece: Piece, linear: str) -> bool:
        """Whether the file's columns are the linear's inputs, in their order: its rows are found bit for bit."""
        turn = self._alignment.turn(f"{linear}.weight")
        if turn is None or turn.shift:
            return False
        parts = [part for part in turn.parts if part.name == piece[0].name and part.expert in {None, piece[1]}]
        return bool(parts) and all((turn.swapped != one.swapped) == self._transposed[linear] for one in parts)

    def _rows_of(self, kind: str, pieces: list[Piece]) -> _Rows:
        first = np.concatenate([self._having[target.name, kind][0].read((target, at)) for target, at in pieces])
        names = [f"{target.name} {matrix}" for target, matrix in pieces]
        digest = hashlib.sha256(first.data).hexdigest()
        version = [FEEDBACK_VERSION, SOLVER_VERSION]
        key = key_of({"version": version, "pieces": names, "type": kind, "first": digest})
        return _Rows(kind, pieces, first, self._saved.hessians / f"solved-{key[:32]}.safetensors")

    def _begin(self, saved: SavedHessian, parts: list[_Rows]) -> BlockFuture:
        def job() -> BlockJob:
            try:
                hessian = saved.read(self._device)
            except (OSError, ValueError, KeyError) as error:
                raise self._saved.damaged(error) from None
            return BlockJob(
                hessian, [BlockRows(one.kind, functools.partial(self._weight, one.pieces), one.first) for one in parts]
            )

        return self._executor.submit_blocks(job)

    def _weight(self, pieces: list[Piece]) -> torch.Tensor:
        file = self._alignment.conversion
        weights = [file.tensor(target.name, at if len(target.shape) > 2 else None) for target, at in pieces]
        return torch.from_numpy(np.concatenate(weights)).to(self._device)

    def _finish(self, pending: _Pending) -> int:
        """Take what a job gave; returns the number of matrices."""
        try:
            solved = pending.future()
        except SolveError as error:
            for target, _ in (piece for part in pending.parts for piece in part.pieces):
                self._sum(target).reason = str(error)
            return sum(len(part.pieces) for part in pending.parts)
        count = 0
        for part, rows in zip(pending.parts, solved, strict=True):
            _save_solved(part.place, rows)
            count += self._take(part, rows)
        return count

    def _take(self, part: _Rows, solved: SolvedRows) -> int:
        """Write rows into every level that has these tensors so, and add them up."""
        first = 0
        for piece in part.pieces:
            target, _ = piece
            rows = slice(first, first + target.shape[-2])
            for made in self._having[target.name, target.kind]:
                made.write(piece, solved.data[rows])
            total = self._sum(target)
            total.before += float(solved.before[rows].sum())
            total.after += float(solved.after[rows].sum())
            total.energy += float(solved.energy[rows].sum())
            total.damping = {"damping": solved.rule, "damp_percent": solved.damp_percent}
            total.solved += 1
            first = rows.stop
        return len(part.pieces)

    def _sum(self, target: Target) -> _Sum:
        return self._sums[target.name, target.kind]

    def _rows(self, made: Made) -> list[dict[str, Any]]:
        assert made.item.feedback
        assert made.item.outcome
        rows = []
        for target in made.item.feedback.targets:
            total = self._sum(target)
            total.reason = total.reason or NO_TOKENS
            rows.append(total.row(target))
        types = made.item.outcome.types
        left = made.item.feedback.left.items()
        return rows + [
            {"tensor": name, "type": types[name], "outcome": "llama.cpp", "reason": reason} for name, reason in left
        ]


def _solved_before(place: Path) -> SolvedRows | None:
    """What an interrupted build solved; None where there is nothing, or it is damaged."""
    try:
        file = TensorFile.guarded(place)
        data, before, after, energy = (file.read(name) for name in ("data", "before", "after", "energy"))
        rule, share = file.read("damping").tolist()
        return SolvedRows(data.numpy(), before, after, energy, RULES[int(rule)], share)
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _save_solved(place: Path, solved: SolvedRows) -> None:
    damping = torch.tensor([RULES.index(solved.rule), solved.damp_percent], dtype=torch.float64)
    tensors = {"before": solved.before, "after": solved.after, "energy": solved.energy, "damping": damping}
    save_whole(place, {"data": torch.from_numpy(solved.data), **tensors})
