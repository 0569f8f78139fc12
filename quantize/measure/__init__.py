"""Measured quality of finished branches and levels, read back from their own bytes, noted in their manifests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.calibration.corpus import title
from quantize.calibration.tokens import calibration_identity, load_tokenizer, sample_tokens
from quantize.errors import BuildError, CalibrationError, SourceError
from quantize.formats.manifest import MANIFEST_NAME, is_complete, read_manifest
from quantize.measure.text import held_out
from quantize.planning import Plan, PlannedVariant, plan_recipe
from quantize.planning.estimate import measuring_seconds
from quantize.planning.keys import key_of
from quantize.planning.levels import PlannedLevel
from quantize.recipe import LoadedRecipe
from quantize.release.card import refresh_cards
from quantize.release.config import as_json
from quantize.release.tree import locked
from quantize.source.cache import write_atomically
from quantize.source.resolved import Notify

if TYPE_CHECKING:
    from quantize.measure.quality import Quality, Weights

__all__ = ["Measured", "check_text", "measure_recipe"]

VERSION = 1
"""Raised when the same bytes on the same tokens give other figures: what was measured before is measured again."""

Item = PlannedVariant | PlannedLevel


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        text: its name. tokens: how many. on_calibration_text: whether it is the text of the calibration.
        rows: figures by label, as the manifests hold them; ``source`` is the first.
    """

    text: str
    tokens: int
    on_calibration_text: bool
    rows: Mapping[str, Mapping[str, Any]]

    def as_data(self) -> dict[str, Any]:
        """The figures for machines."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "on_calibration_text": self.on_calibration_text,
            "branches": [{"branch": label, **row} for label, row in self.rows.items()],
        }


def check_text(
    loaded: LoadedRecipe, dist: Path | str, only: Sequence[str], device: str, notify: Notify = lambda line: None
) -> None:
    """Read the measuring text before hours of work depend on it; not if everything is built and measured already.

    Raises:
        CalibrationError: it cannot be had, or is the calibration text.
    """
    from quantize.calibration.corpus import read_text

    task = _Task(plan_recipe(loaded, dist, only, notify=notify), device)
    if all(item.state == "fresh" for item in task.selected) and not task.unmeasured():
        return
    for corpus in task.text.dataset:
        try:
            read_text(corpus, 1)
        except CalibrationError as error:
            reason = str(error).removeprefix("calibration.dataset: ")
            raise CalibrationError(
                f"measure.dataset: {reason}; branches are measured after the build: name another text, or --no-measure"
            ) from None


class _Task:
    """What is to be measured, how, and what identifies the figures."""

    def __init__(self, plan: Plan, device: str) -> None:
        from quantize.calibration.forward import choose_device, choose_dtype

        self.plan, self.device = plan, choose_device(device)
        self.text, self.on_calibration_text = held_out(plan)
        shapes = [(linear.out_features, linear.in_features) for linear in plan.table.linears]
        self.dtype = choose_dtype(plan.recipe.calibration.compute_dtype, self.device, shapes)
        self.title = ", ".join(title(corpus) for corpus in self.text.dataset)
        self.tokens = self.text.samples * self.text.sequence_length
        self.key = key_of({
            "version": VERSION, "source": dict(plan.source.hashes), "text": calibration_identity(self.text),
            "dtype": str(self.dtype), "device": self.device.type,
        })  # fmt: skip

    @property
    def selected(self) -> list[Item]:
        return [item for item in self.plan.everything if item.label in self.plan.selected]

    @property
    def built(self) -> list[Item]:
        """The selected items that lie whole in dist."""
        return [item for item in self.selected if self._is_whole(item)]

    def known(self, item: Item) -> Mapping[str, Any]:
        """An item's figures in its manifest, if they are of this text."""
        quality: dict[str, Any] = self.plan.finished(item).get("quality") or {}
        return quality if quality.get("key") == self.key else {}

    def unmeasured(self) -> list[Item]:
        return [item for item in self.built if not self.known(item)]
