"""A build that is not through yet, on disk: all that is needed to go on after its last finished block.

Below ``dist/.quantize/unfinished/<key>/`` lie the branches' open shards, the states that enter the next block, the
importance matrix so far, and ``state.json``. The state is written last, after everything that it speaks of is
flushed, so at any moment it tells the truth. Imports no torch.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantize.errors import BuildError
from quantize.dist.ledger import LedgerEntry
from quantize.files.digest import key_of
from quantize.dist.layout import UNFINISHED, WORK_FOLDER
from quantize.files.atomic import sync_folder
from quantize.files.atomic import write_atomically

STATE = "state.json"
SCHEMA = 2


@dataclass(frozen=True)
class State:
    """How far a build has come.

    Attributes:
        inputs: what the pass depends on beside its branches: versions, device, dtype; whether its ``statistics`` are
            ``gathered`` or were ``kept``.
        branches: the key of each branch, by label. imatrix: whether an importance matrix is gathered.
        blocks: of the model. next_block: the first that is not finished.
        shape: of the hidden states, [samples, length, width].
        ledger: rows of the finished blocks, by label. missing: tensors that are not written yet, by label.
        tokens: what each linear's importance comes from.
    """

    inputs: Mapping[str, Any]
    branches: Mapping[str, str]
    imatrix: bool
    blocks: int
    next_block: int = 0
    shape: tuple[int, ...] = ()
    ledger: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What its folder is called."""
        return key_of({"inputs": self.inputs, "branches": self.branches, "imatrix": self.imatrix})[:16]

    @property
    def from_store(self) -> bool:
        """Whether kept statistics take the place of a forward pass."""
        return self.inputs["statistics"] == "kept"

    @property
    def is_over(self) -> bool:
        """Whether every block is finished, and only putting into place is left."""
        return self.next_block == self.blocks

    def serves(self, wish: State) -> bool:
        """Whether going on from here gives what ``wish`` asks for."""
        if dict(self.inputs) != dict(wish.inputs) or (wish.imatrix and not self.imatrix):
            return False
        there = dict(self.branches)
        if self.is_over:  # some of its branches may have reached their places already
            return wish.branches.items() <= there.items()
        return there == dict(wish.branches) and self.imatrix == wish.imatrix


@dataclass
class Unfinished:
    """The folder of one unfinished build."""

    folder: Path
    state: State

    @property
    def nbytes(self) -> int:
        """What it takes on the disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def title(self) -> str:
        """What is being built, in a few words."""
        labels = [*self.state.branches, *(["an importance matrix"] if self.state.imatrix else [])]
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

    def rows(self, label: str) -> list[LedgerEntry]:
        """The ledger of a branch as far as it goes."""
        return [LedgerEntry(**row) for row in self.state.ledger.get(label, ())]

    def keep(
        self,
        next_block: int,
        shape: Sequence[int],
        ledgers: Mapping[str, Sequence[LedgerEntry]],
        missing: Mapping[str, Sequence[str]],
        diagonals: Mapping[str, tuple[np.ndarray, int]] | None,
    ) -> None:
        """Note that all blocks before ``next_block`` are finished. What the branches and states wrote is flushed.

        Args:
            diagonals: of H, float32 [K], with token counts, of the linears of all finished blocks.
        """
        known = self.state.tokens
        if new := {name: entry for name, (entry, _) in (diagonals or {}).items() if name not in known}:
            data = io.BytesIO()
            arrays: dict[str, Any] = new
            np.savez(data, **arrays)
            write_atomically(self.folder / f"imatrix-{next_block:05d}.npz", data.getvalue())
        self.state = replace(
            self.state,
            next_block=next_block,
            shape=tuple(shape),
            ledger={label: [asdict(entry) for entry in entries] for label, entries in ledgers.items()},
            missing=missing,
            tokens={name: count for name, (_, count) in (diagonals or {}).items()},
        )
        write_atomically(self.folder / STATE, json.dumps({"schema": SCHEMA, **asdict(self.state)}).encode())
        sync_folder(self.folder)

    def damaged(self, why: object) -> BuildError:
        """The error where it cannot be gone on with."""
        return BuildError(
            f"{self.folder}: this unfinished build is damaged ({why}); remove it with 'quantize clean' and build again"
        )

    def diagonals(self) -> dict[str, tuple[np.ndarray, int]]:
        """The importance matrix as far as it goes."""
        found = {}
        try:
            for path in sorted(self.folder.glob("imatrix-*.npz")):
                with np.load(path) as stored:
                    found.update({name: stored[name] for name in stored.files})
            return {name: (found[name], count) for name, count in self.state.tokens.items()}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise self.damaged(error) from None

    def drop_states(self) -> None:
        """The pass is over: no block needs its input any more."""
        for path in self.folder.glob("states-*"):
            path.unlink()

    def remove(self) -> None:
        """Free its space. The state goes first, so that no half of it is ever taken for a whole."""
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def find_unfinished(dist: Path) -> list[Unfinished]:
    """Every unfinished build in ``dist`` that could be gone on with."""
    folder = dist / WORK_FOLDER / UNFINISHED
    found = (_read(path) for path in (sorted(folder.iterdir()) if folder.is_dir() else ()))
    return [one for one in found if one is not None]


def open_unfinished(dist: Path, wishes: Sequence[State]) -> Unfinished:
    """The unfinished build that serves one of ``wishes``, or a new one for the first of them."""
    for one in find_unfinished(dist):
        if any(one.state.serves(wish) for wish in wishes):
            return one
    wish = wishes[0]
    parent = dist / WORK_FOLDER / UNFINISHED
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.iterdir():
        if _read(leftover) is None:
            shutil.rmtree(leftover, ignore_errors=True)
    folder = parent / wish.key
    folder.mkdir()
    return Unfinished(folder, wish)


def _read(folder: Path) -> Unfinished | None:
    try:
        data = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            return None
        state = State(**data | {"shape": tuple(data["shape"])})
        return Unfinished(folder, state) if folder.name == state.key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # killed before its first block, or of another version: nothing to go on with
