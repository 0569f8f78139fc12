"""Measured quality of finished branches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize.errors import BuildError, RecipeError
from quantize.formats.manifest import is_complete, read_manifest
from quantize.measure.quality import Quality
from quantize.recipe import LoadedRecipe
from quantize.source.resolved import Notify

__all__ = ["Quality", "measure_recipe"]


def measure_recipe(
    loaded: LoadedRecipe,
    dist: Path | str,
    only: Sequence[str],
    text_file: Path | str,
    samples: int,
    length: int,
    *,
    device: str = "auto",
    progress: bool | None = None,
    notify: Notify = lambda line: None,
) -> list[Quality]:
    """Measure the finished, selected branches of a recipe on a text; the source itself comes first.

    Raises:
        RecipeError: the text is one that the recipe calibrates on. BuildError: no branch is built.
    """
    import numpy as np

    from quantize.calibration.forward import choose_device, choose_dtype
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.formats.reader import BranchReader
    from quantize.measure.quality import measure_quality
    from quantize.planning import plan_recipe
    from quantize.recipe.schema import Calibration, Corpus
    from quantize.source.streamed import StreamedModel

    calibration = loaded.recipe.calibration
    for corpus in calibration.dataset:
        if corpus.file and Path(corpus.file).resolve() == Path(text_file).resolve():
            raise RecipeError(f"{text_file}: is the calibration text of this recipe; measure on another one")
    plan = plan_recipe(loaded, dist, only, weights=True, notify=notify)
    built = [item for item in plan.variants if item.label in plan.selected and _is_whole(item.folder)]
    if not built:
        raise BuildError(f"{dist}: no branch of this recipe is built yet; run `quantize build` first")
    where = choose_device(device)
    shapes = [(linear.out_features, linear.in_features) for linear in plan.table.linears]
    dtype = choose_dtype(calibration.compute_dtype, where, shapes)
    trust = loaded.recipe.model.trust_remote_code
    text = Calibration(
        dataset=[Corpus(file=str(text_file))], samples=samples, sequence_length=length, seed=calibration.seed
    )
    ids = np.ascontiguousarray(sample_tokens(text, load_tokenizer(plan.source, trust)).ids)
    model = StreamedModel(plan.source, plan.table.prefix, dtype, where, trust, head=True)
    notify(f"measuring {len(built)} branches on {ids.size} tokens of {Path(text_file).name}")
    readers = {item.label: BranchReader(item.folder) for item in built}
    return measure_quality(model, ids, readers, max(1, calibration.batch_tokens // length), progress)


def _is_whole(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and is_complete(folder, manifest)
