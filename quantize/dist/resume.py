"""An unfinished build on disk: all that is needed to resume after its last finished block.

Below ``dist/.quantize/unfinished/<key>/`` lie the branches' open shards, the states that enter the next block, the
importance matrix so far, and ``blocks.jsonl``, which says what the build is of and then, a line a block, what was
written and its hashes. The line is written last, after everything that it speaks of is flushed, so at any moment the
file tells the truth; and what it speaks of is held against its hash before it is used. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.dist.layout import UNFINISHED, WORK_FOLDER
from quantize.dist.ledger import LedgerEntry
from quantize.dist.records import BLOCKS, Records
from quantize.errors import DamagedBuild
from quantize.files.atomic import sync_folder, write_atomically
from quantize.files.digest import key_of

SCHEMA = 4


@dataclass(frozen=True)
class State:
    """What a build is of, and how far it has come.

    Attributes:
        inputs: what the pass depends on beside its branches: versions, device, dtype; whether its ``statistics`` are
            ``gathered`` or were ``kept``.
        branches: the key of each branch, by label. imatrix: whether an importance matrix is gathered.
        blocks: of the model. next_block: the first that is not finished.
        shape: of the hidden states, [samples, length, width].
        hessians: whether Hessians are saved for GGUF levels.
    """

    inputs: Mapping[str, Any]
    branches: Mapping[str, str]
    imatrix: bool
    blocks: int
    next_block: int = 0
    shape: tuple[int, ...] = ()
    hessians: bool = False

    @property
    def key(self) -> str:
        """What its folder is called."""
        of = {"inputs": self.inputs, "branches": self.branches, "imatrix": self.imatrix}
        return key_of({**of, **({"hessians": True} if self.hessians else {})})[:16]

    @property
    def from_store(self) -> bool:
        """Whether kept statistics take the place of a forward pass."""
        return bool(self.inputs["statistics"] == "kept")

    @property
    def is_over(self) -> bool:
        """Whether every block is finished, and only putting into place is left."""
        return self.next_block == self.blocks

    def serves(self, wanted: State) -> bool:
        """Whether a build that resumes from here gives what ``wanted`` asks for."""
        if dict(self.inputs) != dict(wanted.inputs):
            return False
        if (wanted.imatrix and not self.imatrix) or (wanted.hessians and not self.hessians):
            return False
        there = dict(self.branches)
        if self.is_over:  # some of its branches may have reached their places already
            return wanted.branches.items() <= there.items()
        same = self.imatrix == wanted.imatrix and self.hessians == wanted.hessians
        return there == dict(wanted.branches) and same


@dataclass(frozen=True)
class Block:
    """What a finished block left, all of it flushed to the disk.

    Attributes:
        next_block: the block after it. shape: of the hidden states, [samples, length, width].
        ledger: new rows, by label. written: checksums of new tensors by name, by label.
        states: SHA-256 of the files of the states that enter the next block, by file name.
        tokens: what the importance of the block's linears comes from. importance: file and SHA-256 of their diagonals.
    """

    next_block: int
    shape: tuple[int, ...] = ()
    ledger: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    written: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    importance: tuple[str, str] | None = None


@dataclass
class Unfinished:
    """The folder of one unfinished build.

    Attributes:
        blocks: what the finished blocks left.
    """

    folder: Path
    state: State
    records: Records
    blocks: list[Block] = field(default_factory=list)

    @property
    def fault(self) -> str | None:
        """What is wrong with the record of the finished blocks, where something is."""
        return self.records.fault

    @property
    def nbytes(self) -> int:
        """What it takes on the disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def title(self) -> str:
        """What is being built, in a few words."""
        labels = [*self.state.branches, *(["an importance matrix"] if self.state.imatrix else [])]
        labels += ["Hessians of GGUF levels"] if self.state.hessians else []
        return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")

    @property
    def progress(self) -> str:
        """Blocks that are finished, of all."""
        return f"{self.state.next_block} of {self.state.blocks}"

    def as_data(self) -> dict[str, Any]:
        """For machines."""
        return {
            "branches": list(self.state.branches),
            "imatrix": self.state.imatrix,
            "blocks": self.state.blocks,
            "finished_blocks": self.state.next_block,
            "bytes_on_disk": self.nbytes,
        }

    def branch(self, label: str) -> Path:
        """Where a branch is being made."""
        return self.folder / "branches" / label

    @property
    def hessians(self) -> Path:
        """Where the Hessians for GGUF levels lie, and beside them in ``solved`` what is solved already."""
        return self.folder / "hessians"

    def rows(self, label: str) -> list[LedgerEntry]:
        """The ledger of a branch as far as it goes."""
        return [LedgerEntry(**row) for block in self.blocks for row in block.ledger.get(label, ())]

    def written(self, label: str) -> dict[str, str]:
        """Checksums of a branch's tensors that are written, by name."""
        return {name: checksum for block in self.blocks for name, checksum in block.written.get(label, {}).items()}

    def states_digest(self, file: str) -> str | None:
        """SHA-256 of a file of the states that enter the next block."""
        return self.blocks[-1].states.get(file) if self.blocks else None

    def keep(self, block: Block, diagonals: Mapping[str, tuple[NDArray[np.float32], int]] | None) -> None:
        """Note a finished block. What the branches and states wrote is flushed.

        Args:
            diagonals: of H, float32 [K], with token counts, of the linears of all finished blocks.

        Raises:
            OSError: no space; the blocks before it stay finished.
        """
        known = {name for before in self.blocks for name in before.tokens}
        if new := {name: entry for name, entry in (diagonals or {}).items() if name not in known}:
            data = io.BytesIO()
            arrays: dict[str, Any] = {name: diagonal for name, (diagonal, _) in new.items()}
            np.savez(data, **arrays)
            file = f"imatrix-{block.next_block:05d}.npz"
            write_atomically(self.folder / file, data.getvalue())
            block = replace(
                block,
                tokens={name: count for name, (_, count) in new.items()},
                importance=(file, hashlib.sha256(data.getvalue()).hexdigest()),
            )
        sync_folder(self.folder)
        self.records.append(*([] if self.records.lines else [_head(self.state)]), asdict(block))
        self._enter(block)

    def damaged(self, why: object) -> DamagedBuild:
        """Build the error for an unusable resume folder."""
        return DamagedBuild(
            f"{self.folder}: this unfinished build is damaged ({why}); remove it with 'quantize clean' and build again"
        )

    def diagonals(self) -> dict[str, tuple[NDArray[np.float32], int]]:
        """The importance matrix as far as it goes.

        Raises:
            DamagedBuild: it is not what was written.
        """
        found: dict[str, tuple[NDArray[np.float32], int]] = {}
        try:
            for block in self.blocks:
                if block.importance is None:
                    continue
                file, digest = block.importance
                data = (self.folder / file).read_bytes()
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ValueError(f"{file} is not what was written")
                with np.load(io.BytesIO(data)) as stored:
                    found.update({name: (stored[name], count) for name, count in block.tokens.items()})
            return found
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise self.damaged(error) from None

    def drop_states(self) -> None:
        """The pass is over: no block needs its input any more."""
        for path in self.folder.glob("states-*"):
            path.unlink()

    def remove(self) -> None:
        """Free its space. The record goes first, so that no half of it is ever taken for a whole."""
        (self.folder / BLOCKS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _enter(self, block: Block) -> None:
        self.blocks.append(block)
        self.state = replace(self.state, next_block=block.next_block, shape=block.shape)


def find_unfinished(dist: Path) -> list[Unfinished]:
    """Every unfinished build in ``dist`` that can be resumed."""
    folder = dist / WORK_FOLDER / UNFINISHED
    found = (_read(path) for path in (sorted(folder.iterdir()) if folder.is_dir() else ()))
    return [one for one in found if one is not None]


def open_unfinished(dist: Path, candidates: Sequence[State]) -> Unfinished:
    """The unfinished build that serves one of ``candidates``, or a new one for the first of them.

    Raises:
        DamagedBuild: the record of its blocks is damaged.
    """
    for one in find_unfinished(dist):
        if any(one.folder.name == wanted.key or one.state.serves(wanted) for wanted in candidates):
            if one.fault:
                raise one.damaged(one.fault)
            return one
    wanted = candidates[0]
    parent = dist / WORK_FOLDER / UNFINISHED
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.iterdir():
        if _read(leftover) is None:
            shutil.rmtree(leftover, ignore_errors=True)
    folder = parent / wanted.key
    folder.mkdir()
    return Unfinished(folder, wanted, Records(folder / BLOCKS))


def _head(state: State) -> dict[str, Any]:
    """The first line: what does not change from block to block."""
    fixed = {name: value for name, value in asdict(state).items() if name not in {"next_block", "shape"}}
    return {"schema": SCHEMA, **fixed}


def _read(folder: Path) -> Unfinished | None:
    try:
        records = Records.read(folder / BLOCKS)
        head, *lines = records.lines
        if head.pop("schema") != SCHEMA:
            return None
        state = State(**head)
        if folder.name != state.key:
            return None
        one = Unfinished(folder, state, records)
        for line in lines:
            one._enter(_block(line))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # killed before its first block, or of another version: nothing to resume from
    return one if one.blocks or one.fault else None


def _block(line: Mapping[str, Any]) -> Block:
    importance = line["importance"]
    return Block(
        **{**line, "shape": tuple(line["shape"]), "importance": tuple(importance) if importance else None}
    )
