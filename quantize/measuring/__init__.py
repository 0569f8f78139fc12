"""Measured quality of finished branches and levels, read back from their own bytes, noted in their manifests."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantize.calibration.corpus import title
from quantize.calibration.tokens import calibration_identity, load_tokenizer, sample_tokens
from quantize.dist.layout import Dist, locked
from quantize.dist.manifest import MANIFEST_NAME, Manifest, is_complete, update, with_quality
from quantize.errors import CalibrationError, ReleaseError, SourceError
from quantize.files.child import without_secrets
from quantize.files.digest import key_of
from quantize.measuring.text import held_out
from quantize.options import MeasureOptions
from quantize.planning.estimate import measuring_seconds
from quantize.planning.items import PlannedLevel, PlannedVariant
from quantize.planning.plan import Plan
from quantize.planning.planner import plan_recipe
from quantize.publishing.bounds import out_of_bounds, require_within_bounds, verdicts
from quantize.publishing.card import refresh_cards
from quantize.recipe import LoadedRecipe
from quantize.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from quantize.measuring.quality import Quality, Weights

__all__ = ["Measured", "check_text", "measure_recipe"]

VERSION = 2
"""Raised when the same bytes on the same tokens give other figures: what was measured before is measured again."""

Item = PlannedVariant | PlannedLevel


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        text: its name. tokens: how many. on_calibration_text: whether it is the text of the calibration.
        rows: figures by label, as the manifests hold them (None: not finite); ``source`` is the first.
        plan: the plan whose variants were measured.
    """

    text: str
    tokens: int
    on_calibration_text: bool
    rows: Mapping[str, Mapping[str, Any]]
    plan: Plan = field(repr=False)

    @property
    def out_of_bounds(self) -> dict[str, str]:
        """Why variants are out of the recipe's bounds, by label."""
        return out_of_bounds(self.plan, self.plan.selected)

    def require_within_bounds(self) -> None:
        """Raise :class:`QualityError` if a variant is out of the recipe's bounds."""
        require_within_bounds(self.plan)

    def as_data(self) -> dict[str, Any]:
        """The figures for machines."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "on_calibration_text": self.on_calibration_text,
            "out_of_bounds": self.out_of_bounds,
            "branches": [{"branch": label, **row} for label, row in self.rows.items()],
        }


def check_text(loaded: LoadedRecipe, options: MeasureOptions, reporter: Reporter = SILENT) -> None:
    """Read the measuring text before hours of work depend on it; not if everything is built and measured already.

    Raises:
        CalibrationError: it cannot be had, or is the calibration text.
    """
    from quantize.calibration.corpus import read_pieces

    task = _Task(plan_recipe(loaded, options, reporter), options.device)
    if all(item.state == "fresh" for item in task.selected) and not task.unmeasured():
        return
    if any(isinstance(item, PlannedLevel) and item.state != "fresh" for item in task.selected):
        _check_levels(plan_recipe(loaded, options, reporter, weights=True), reporter)
    for corpus in task.text.dataset:
        try:
            next(read_pieces(corpus), None)
        except CalibrationError as error:
            reason = str(error).removeprefix("calibration.dataset: ")
            raise CalibrationError(
                f"measure.dataset: {reason}; branches are measured after the build: name another text, or --no-measure"
            ) from None


def _check_levels(plan: Plan, reporter: Reporter) -> None:
    """Convert the source, and check that its levels can be measured, before they are made."""
    from quantize.measuring.gguf import GgufFile, check_levels_can_be_read_back
    from quantize.source.source_tensors import SourceTensors

    levels = plan.gguf
    assert levels is not None
    levels.require()
    header, path = levels.conversion.header(reporter), levels.conversion.make(reporter)
    full = GgufFile([path])
    types = [(name, kind) for item in levels.levels if item.outcome for name, kind in item.outcome.types.items()]
    quantized = {name for name, kind in types if kind != full.type_of(name)}
    check_levels_can_be_read_back(path, header.converted, SourceTensors(plan.source).read, quantized)


class _Task:
    """What is to be measured, how, and what identifies the figures."""

    def __init__(self, plan: Plan, device: str) -> None:
        from quantize.calibration.forward import choose_device, choose_dtype

        plan.require_own()
        self.plan, self.device = plan, choose_device(device)
        self.text, self.on_calibration_text = held_out(plan)
        self.dtype = choose_dtype(plan.recipe.calibration.compute_dtype, self.device)
        self.title = ", ".join(title(corpus) for corpus in self.text.dataset)
        self.tokens = self.text.samples * self.text.sequence_length
        self.key = key_of({
            "version": VERSION, "source": dict(plan.source.hashes), "text": calibration_identity(self.text),
            "dtype": str(self.dtype), "device": self.device.type,
        })  # fmt: skip

    @property
    def selected(self) -> list[Item]:
        return [
            item
            for item in self.plan.everything
            if item.label in self.plan.selected and not (isinstance(item, PlannedLevel) and item.is_projector)
        ]

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

    def _is_whole(self, item: Item) -> bool:
        found = self.plan.finished(item)
        return bool(found) and item.folder.is_dir() and is_complete(item.folder, found)


def measure_recipe(
    loaded: LoadedRecipe,
    options: MeasureOptions | None = None,
    reporter: Reporter = SILENT,
) -> Measured:
    """Measure the finished, selected branches and levels of a recipe, note it in their manifests and cards.

    Args:
        options: which of them, and how. reporter: hears what happens.

    Raises:
        CalibrationError: the text is the calibration text, or cannot be had. BuildError: nothing is built.
        GgufError: a level's tensors cannot be brought in the source's order.
    """
    options = options or MeasureOptions()
    with locked(options.dist, create=False) as held:
        task = _Task(plan_recipe(loaded, options, reporter, weights=True), options.device)
        built = task.built
        if not built:
            raise ReleaseError(f"{options.dist}: no branch of this recipe is built yet; run `quantize build` first")
        todo = built if options.again else task.unmeasured()
        alone = without_secrets() if loaded.recipe.model.trust_remote_code else nullcontext()
        if todo:
            with alone:
                rows = _measure(task, todo, reporter)
            for item, row in zip(todo, rows, strict=True):
                _note(held, item, row)
        _note_verdicts(held, task.plan)
        refresh_cards(task.plan, held)
    figures = {item.label: task.known(item) for item in built}
    source = next(iter(figures.values()))["source"]
    return Measured(task.title, task.tokens, task.on_calibration_text, {"source": source, **figures}, task.plan)


def _measure(task: _Task, todo: Sequence[Item], reporter: Reporter) -> list[dict[str, Any]]:
    """Manifest entries of ``todo``, in its order."""
    import numpy as np

    from quantize.measuring.quality import AGAIN, SOURCE, measure_quality
    from quantize.measuring.store import Store
    from quantize.source.accelerator import settled
    from quantize.source.streamed import StreamedModel

    plan, recipe = task.plan, task.plan.recipe
    trust = recipe.model.trust_remote_code
    ids = np.ascontiguousarray(sample_tokens(task.text, load_tokenizer(plan.source, trust)).ids)
    seconds = measuring_seconds(plan.source.checkpoint, plan.table, len(ids), ids.shape[1], len(todo))
    spent = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    reporter.say(f"measuring {len(todo)} branches on {ids.size} tokens of {task.title}, in about {spent}")
    artefacts = {item.label: plan.finished(item).get("files") for item in todo}
    source_key = key_of({"source": task.key, "tokens": hashlib.sha256(ids.tobytes()).hexdigest()})
    store = Store(source_key, key_of({"source": source_key, "artefacts": artefacts}))
    batch = max(1, recipe.calibration.batch_tokens // ids.shape[1])
    with settled():
        model = StreamedModel(
            plan.source, task.dtype, task.device, trust_remote_code=trust, head=True, taken=plan.table.names
        )
        found = measure_quality(model, ids, _readers(plan, todo, model.read), batch, store=store, reporter=reporter)
    rows = {row.branch: _figures(row) for row in found}
    if rows[SOURCE]["perplexity"] is None:
        raise CalibrationError(
            "the source's own output contains NaN or infinity, so nothing can be compared with it; the weights are "
            "damaged, or the compute dtype is too narrow (calibration.compute_dtype: float32)"
        )
    common = {
        "key": task.key,
        "text": task.title,
        "tokens": task.tokens,
        "sequence_length": task.text.sequence_length,
        "on_calibration_text": task.on_calibration_text,
        "source": {name: rows[SOURCE][name] for name in ("perplexity", "perplexity_error")},
        "noise_floor": rows[AGAIN]["kl_divergence"] if AGAIN in rows else None,
    }
    return [{**common, **rows[item.label]} for item in todo]


def _readers(plan: Plan, todo: Sequence[Item], read: Any) -> dict[str, Weights]:
    from quantize.formats.reader import BranchReader
    from quantize.measuring.gguf import open_levels

    readers: dict[str, Weights] = {
        item.label: BranchReader(item.folder) for item in todo if isinstance(item, PlannedVariant)
    }
    levels = [item for item in todo if isinstance(item, PlannedLevel)]
    if levels and plan.gguf:
        conversion = plan.gguf.conversion
        path, header = conversion.make(), conversion.header()
        files = {item.label: [item.folder / name for name in sorted(plan.finished(item)["files"])] for item in levels}
        readers |= open_levels(files, path, header.converted, read)
    return readers


def _figures(row: Quality) -> dict[str, Any]:
    """Five digits are more than the figures are worth; None is a figure that is not finite, which JSON cannot hold."""
    return {
        name: float(f"{value:.5g}") if math.isfinite(value) else None
        for name, value in row.as_data().items()
        if name != "branch"
    }


def _note(held: Dist, item: Item, quality: Mapping[str, Any]) -> None:
    def noted(known: Manifest | None) -> Manifest:
        if known is None:
            raise SourceError(f"{item.folder / MANIFEST_NAME}: cannot be read any more")
        return with_quality(known, quality, item.level if isinstance(item, PlannedLevel) else None)

    update(held, item.folder, noted)


def _note_verdicts(held: Dist, plan: Plan) -> None:
    """Note in the manifests which measured variants are out of bounds, as far as that is not noted yet."""
    items = {item.label: item for item in plan.everything}
    for label, verdict in verdicts(plan).items():
        quality, data = plan.finished(items[label])["quality"], verdict.as_data()
        if quality.get("verdict") != data:
            _note(held, items[label], {**quality, "verdict": data})
