"""Measured quality of finished branches and levels, read back from their own bytes, noted in their manifests."""

from __future__ import annotations

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
        rows: figures by label, as the manifests hold them; ``source`` is among them.
        fresh: labels whose figures were known already.
    """

    text: str
    tokens: int
    on_calibration_text: bool
    rows: Mapping[str, Mapping[str, Any]]
    fresh: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        """The figures for machines."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "on_calibration_text": self.on_calibration_text,
            "branches": [{"branch": label, **row} for label, row in self.rows.items()],
        }


def check_text(loaded: LoadedRecipe, dist: Path | str, only: Sequence[str], notify: Notify) -> None:
    """Read the measuring text before hours of work depend on it.

    Raises:
        CalibrationError: it cannot be had, or is the calibration text.
    """
    from quantize.calibration.corpus import read_text

    text, _ = held_out(plan_recipe(loaded, dist, only, notify=notify))
    for corpus in text.dataset:
        try:
            read_text(corpus, 1)
        except CalibrationError as error:
            reason = str(error).removeprefix("calibration.dataset: ")
            raise CalibrationError(
                f"measure.dataset: {reason}; branches are measured after the build: name another text, or --no-measure"
            ) from None


def measure_recipe(
    loaded: LoadedRecipe,
    dist: Path | str = "dist",
    only: Sequence[str] = (),
    *,
    again: bool = False,
    device: str = "auto",
    progress: bool | None = None,
    notify: Notify = lambda line: None,
) -> Measured:
    """Measure the finished, selected branches and levels of a recipe, note it in their manifests and cards.

    Args:
        again: measure also what is known already.
        device, progress, notify: as for a build.

    Raises:
        CalibrationError: the text is the calibration text, or cannot be had. BuildError: nothing is built.
        GgufError: a level's tensors cannot be brought in the source's order.
    """
    from quantize.calibration.forward import choose_device, choose_dtype

    with locked(Path(dist)):
        plan = plan_recipe(loaded, dist, only, weights=True, notify=notify)
        built = [item for item in plan.everything if item.label in plan.selected and _is_whole(plan, item)]
        if not built:
            raise BuildError(f"{dist}: no branch of this recipe is built yet; run `quantize build` first")
        text, on_calibration_text = held_out(plan)
        recipe, where = loaded.recipe, choose_device(device)
        shapes = [(linear.out_features, linear.in_features) for linear in plan.table.linears]
        dtype = choose_dtype(recipe.calibration.compute_dtype, where, shapes)
        tokens = sample_tokens(text, load_tokenizer(plan.source, recipe.model.trust_remote_code))
        source_key = key_of({
            "version": VERSION, "source": dict(plan.source.hashes), "text": calibration_identity(text),
            "tokens": tokens.sha256, "dtype": str(dtype), "device": where.type,
        })  # fmt: skip
        shown = ", ".join(title(corpus) for corpus in text.dataset)
        known = {item.label: plan.finished(item).get("quality") or {} for item in built}
        fresh = [label for label, row in known.items() if row.get("key") == source_key and not again]
        todo = [item for item in built if item.label not in fresh]
        if todo:
            notify(f"measuring {len(todo)} branches on {tokens.ids.size} tokens of {shown}")
            rows = _measure(plan, todo, tokens.ids, dtype, where, source_key, progress)
            common = {
                "key": source_key,
                "text": shown,
                "tokens": int(tokens.ids.size),
                "sequence_length": text.sequence_length,
                "on_calibration_text": on_calibration_text,
                **_of_source(rows),
            }
            for item in todo:
                row = next(row for row in rows if row.branch == item.label)
                known[item.label] = {**common, **_figures(row)}
                _note(item, known[item.label])
        refresh_cards(plan)
    of_source = next(iter(known.values()))["source"]
    return Measured(shown, int(tokens.ids.size), on_calibration_text, {"source": of_source, **known}, tuple(fresh))


def _measure(
    plan: Plan, todo: Sequence[Item], ids: Any, dtype: Any, device: Any, source_key: str, progress: bool | None
) -> list[Quality]:
    import numpy as np

    from quantize.measure.quality import measure_quality
    from quantize.measure.store import Store
    from quantize.source.streamed import StreamedModel

    recipe = plan.recipe
    trust = recipe.model.trust_remote_code
    model = StreamedModel(plan.source, plan.table.prefix, dtype, device, trust, head=True)
    ids = np.ascontiguousarray(ids)
    artefacts = {item.label: plan.finished(item).get("files") for item in todo}
    store = Store(source_key, key_of({"source": source_key, "artefacts": artefacts}))
    batch = max(1, recipe.calibration.batch_tokens // ids.shape[1])
    return measure_quality(model, ids, _readers(plan, todo, model.read), batch, progress, store)


def _readers(plan: Plan, todo: Sequence[Item], read: Any) -> dict[str, Weights]:
    from quantize.formats.reader import BranchReader
    from quantize.measure.gguf import open_levels

    readers: dict[str, Weights] = {
        item.label: BranchReader(item.folder) for item in todo if isinstance(item, PlannedVariant)
    }
    levels = [item for item in todo if isinstance(item, PlannedLevel)]
    if levels and plan.gguf:
        conversion = plan.gguf.conversion
        path, header = conversion.make(), conversion.header()
        files = {item.label: [item.folder / name for name in sorted(plan.finished(item)["files"])] for item in levels}
        readers |= open_levels(files, path, header.became, read)
    return readers


def _of_source(rows: Sequence[Quality]) -> dict[str, Any]:
    from quantize.measure.quality import AGAIN, SOURCE

    by_name = {row.branch: row for row in rows}
    noise = by_name.get(AGAIN)
    own = _figures(by_name[SOURCE])
    return {
        "source": {"perplexity": own["perplexity"], "perplexity_error": own["perplexity_error"]},
        "noise_floor": _figures(noise)["kl_divergence"] if noise else None,
    }


def _figures(row: Quality) -> dict[str, Any]:
    """Four digits are more than the figures are worth, and the same on every run."""
    return {name: float(f"{value:.5g}") for name, value in row.as_data().items() if name != "branch"}


def _note(item: Item, quality: Mapping[str, Any]) -> None:
    data = read_manifest(item.folder)
    if data is None:
        raise SourceError(f"{item.folder / MANIFEST_NAME}: cannot be read any more")
    holder = data["levels"][item.level] if isinstance(item, PlannedLevel) else data
    holder["quality"] = dict(quality)
    write_atomically(item.folder / MANIFEST_NAME, as_json(data))


def _is_whole(plan: Plan, item: Item) -> bool:
    found = plan.finished(item)
    return bool(found) and item.folder.is_dir() and is_complete(item.folder, found)
