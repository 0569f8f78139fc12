"""The GGUF part of a plan: one file per level, exact sizes, fallbacks, what is fresh. Imports no torch.

Types and sizes come from llama.cpp: a dry run of its quantizer, in a child process, on the header that its converter
writes. The results are cached beside that header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.calibration.corpus import title
from quantize.dist.manifest import is_complete, read_manifest
from quantize.errors import GgufError
from quantize.files.atomic import write_atomically
from quantize.files.digest import key_of, sha256_of_file
from quantize.gguf.convert import Conversion, Header, outtype_of
from quantize.gguf.quantize import ANY, Outcome, predict, request
from quantize.gguf.toolchain import VERSION, missing_library
from quantize.planning.feedback import FEEDBACK_VERSION, Feedback, feedback_of
from quantize.planning.items import PlannedLevel, State
from quantize.planning.keys import SOLVER_VERSION, STATISTICS_VERSION, differences
from quantize.planning.modules import ModuleTable
from quantize.recipe.levels import MMPROJ
from quantize.recipe.methods import Gguf
from quantize.recipe.schema import Recipe
from quantize.reporter import SILENT, Reporter
from quantize.source.resolved import Source, safe_name

LEVELS_VERSION = 1
"""Raise it when llama.cpp is called in another way for the same level: finished levels become stale."""
BRANCH = "main"
ENCODER_CONFIGS = ("vision_config", "audio_config", "vision_encoder", "whisper_config", "visual")
"""Parts of a config that describe an encoder of images or sound."""


@dataclass(frozen=True)
class LevelPlan:
    """All levels of a recipe.

    Attributes:
        conversion: the full-width file that they are quantized from.
        imatrix_file: name of the importance matrix in the repo, or None; ``imatrix_key`` is what it depends on.
        lacking: the reason why llama.cpp cannot make them, or None.
        projector: the conversion of the model's encoder and projector of images or sound, or None.
        notes: what users of the files have to know, one sentence each.
    """

    repo: str
    section: Gguf
    conversion: Conversion
    model: str
    folder: Path
    imatrix_file: str | None
    imatrix_inputs: Mapping[str, Any]
    levels: tuple[PlannedLevel, ...]
    lacking: str | None
    projector: Conversion | None = None
    notes: tuple[str, ...] = ()

    def require(self) -> None:
        """Raise :class:`GgufError` with the reason if the levels cannot be made."""
        if self.lacking is not None:
            raise GgufError(self.lacking)

    @property
    def needs_pass(self) -> bool:
        """Whether an importance matrix has to be collected, because the repo has none of this key."""
        if self.imatrix_file is None or self.section.imatrix is not True:
            return False
        known = (read_manifest(self.folder) or {}).get("imatrix") or {}
        return known.get("key") != key_of(self.imatrix_inputs) or not is_complete(
            self.folder, {"files": known.get("files", {})}
        )

    def metadata(self, entries: int) -> dict[str, Any]:
        """Metadata of a level's file about its importance matrix, with llama-quantize's keys."""
        if self.imatrix_file is None:
            return {}
        return {
            "quantize.imatrix.file": self.imatrix_file,
            "quantize.imatrix.dataset": str(self.imatrix_inputs["dataset"]),
            "quantize.imatrix.entries_count": entries,
            "quantize.imatrix.chunks_count": int(self.imatrix_inputs["chunks"]),
        }


def plan_levels(
    recipe: Recipe,
    source: Source,
    calibration: Mapping[str, Any],
    repo: str,
    *,
    dist: Path,
    table: ModuleTable,
    reporter: Reporter = SILENT,
) -> LevelPlan:
    """Plan the levels of a recipe.

    Args:
        calibration: the calibration's identity, as in the keys of branches. table: the linears with statistics.

    Raises:
        GgufError: the file that the recipe names is not an importance matrix.
    """
    section = recipe.gguf
    assert section is not None
    name = recipe.model.name or source.short_name
    model = safe_name(repo.rsplit("/", 1)[-1].removesuffix("-GGUF"))
    outtype, trust = outtype_of(source.checkpoint, section.intermediate), recipe.model.trust_remote_code
    conversion = Conversion(source, outtype, name, _authorship(recipe, source), trust, nextn=section.nextn)
    folder = dist / repo.rsplit("/", 1)[-1] / BRANCH
    file, inputs = _imatrix(recipe, source, calibration, model)
    lacking = missing_library()
    blank = LevelPlan(repo, section, conversion, model, folder, file, inputs, (), lacking)
    outcomes: dict[str, Outcome] = {}
    feedback: dict[str, Feedback] = {}
    if lacking is None:
        try:
            header = conversion.header(reporter)
            outcomes = _outcomes(blank, header)
            if section.solve == "error_feedback":
                shapes = header.shapes()
                feedback = {level: feedback_of(one, header, shapes, table) for level, one in outcomes.items()}
            blank = dataclasses.replace(blank, notes=header.notes)
        except GgufError as error:  # the recipe's other methods can still be built
            blank = dataclasses.replace(blank, lacking=str(error))
    levels = tuple(
        _planned(blank, level, outcomes.get(level), bool(inputs) and _uses_imatrix(level), feedback.get(level))
        for level in section.levels
    )
    blank = dataclasses.replace(blank, levels=levels)
    return _with_projector(blank, reporter) if blank.lacking is None and section.mmproj else blank


def _with_projector(plan: LevelPlan, reporter: Reporter) -> LevelPlan:
    """The plan with the encoder and projector of a model that reads images or sound, if llama.cpp can convert them."""
    config = plan.conversion.source.checkpoint.config
    if not any(isinstance(config.get(key), dict) for key in ENCODER_CONFIGS):
        return plan
    projector = dataclasses.replace(plan.conversion, outtype="F16", part="mmproj", nextn=True)
    try:
        header = projector.header(reporter)
    except GgufError as error:
        reason = str(error).removeprefix(f"{plan.conversion.source.named}: llama.cpp cannot convert this model: ")
        return dataclasses.replace(plan, notes=(*plan.notes, f"text only, without an mmproj file: {reason}"))
    if not header.converted:
        note = "text only, without an mmproj file: the checkpoint has no weights of an encoder"
        return dataclasses.replace(plan, notes=(*plan.notes, note))
    file = f"mmproj-{plan.model}-{projector.outtype}.gguf"
    inputs = {
        "conversion": projector.identity,
        "quantizer": None,
        "version": LEVELS_VERSION,
        "level": MMPROJ,
        "tensor_types": {},
        "imatrix": None,
        "file": file,
        "max_file_size": plan.section.max_file_size,
    }
    state, why = _state(plan.folder, MMPROJ, inputs)
    outcome = Outcome({}, (), header.path.stat().st_size)
    item = PlannedLevel(plan.repo, MMPROJ, plan.folder, file, outcome, inputs, state, why)
    return dataclasses.replace(plan, projector=projector, levels=(*plan.levels, item))


def _uses_imatrix(level: str) -> bool:
    return level not in {"F32", "F16", "BF16"}


def _imatrix(
    recipe: Recipe, source: Source, calibration: Mapping[str, Any], model: str
) -> tuple[str | None, Mapping[str, Any]]:
    section = recipe.gguf
    assert section is not None
    if section.imatrix is False:
        return None, {}
    if isinstance(section.imatrix, str):
        path = Path(section.imatrix)
        if not os.path.isfile(path):
            raise GgufError(f"{section.imatrix}: this file does not exist; set gguf.imatrix to true to make one")
        from quantize.gguf.imatrix import read_importance

        given = read_importance(path)
        inputs = {"sha256": sha256_of_file(path), "dataset": given.dataset, "chunks": given.chunks}
        return f"{model}-imatrix.gguf", inputs
    settings = recipe.calibration
    return f"{model}-imatrix.gguf", {
        "source": dict(source.hashes),
        "calibration": dict(calibration),
        "compute_dtype": settings.compute_dtype,
        "batch_tokens": settings.batch_tokens,
        "statistics": STATISTICS_VERSION,
        "dataset": ", ".join(title(corpus) for corpus in settings.dataset),
        "chunks": settings.samples,
    }


def _authorship(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Metadata keys of the file about the model and its authors."""
    found: dict[str, Any] = {"general.quantized_by": recipe.release.quantized_by or recipe.release.owner}
    if recipe.model.license:
        found["general.license"] = recipe.model.license
    if recipe.model.creator:
        found["general.author"] = recipe.model.creator
    if source.base_model:
        found["general.base_models"] = [
            {
                "name": recipe.model.name or source.short_name,
                "organization": source.base_model.split("/")[0],
                "repo_url": f"https://huggingface.co/{source.base_model}",
            }
        ]
    return found


def _planned(
    blank: LevelPlan, level: str, outcome: Outcome | None, with_imatrix: bool, feedback: Feedback | None
) -> PlannedLevel:
    file = f"{blank.model}-{level}.gguf"
    inputs = {
        "conversion": blank.conversion.identity,
        "quantizer": f"llama-cpp-python {VERSION}",
        "version": LEVELS_VERSION,
        "level": level,
        "tensor_types": dict(blank.section.tensor_types),
        "imatrix": dict(blank.imatrix_inputs) if with_imatrix else None,
        "file": file,
        "max_file_size": blank.section.max_file_size,
        # a level without such tensors has llama.cpp's bytes either way
        **({"solve": _solve_inputs(feedback)} if feedback and feedback.targets else {}),
    }
    if blank.lacking is not None:
        return PlannedLevel(blank.repo, level, blank.folder, file, None, inputs, "refused", blank.lacking)
    state, why = _state(blank.folder, level, inputs)
    return PlannedLevel(blank.repo, level, blank.folder, file, outcome, inputs, state, why, feedback)


def _solve_inputs(feedback: Feedback) -> dict[str, Any]:
    """What error feedback adds to a level's key: beside its version, which inputs have a Hessian."""
    return {
        "method": "error_feedback",
        "version": FEEDBACK_VERSION,
        "solver": SOLVER_VERSION,
        "linears": key_of({"names": sorted(feedback.linears)}),
    }


def _state(folder: Path, level: str, inputs: Mapping[str, Any]) -> tuple[State, str]:
    known = ((read_manifest(folder) or {}).get("levels") or {}).get(level)
    if known is None:
        return "missing", "not built yet"
    if not is_complete(folder, known):
        return "stale", "its file is missing or truncated"
    if known.get("key") == key_of(inputs):
        return "fresh", "up to date"
    changed = differences(known.get("key_inputs") or {}, inputs)
    return "stale", "changed: " + (changed[0] if changed else "its key") + (
        f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    )


def _outcomes(blank: LevelPlan, header: Header) -> dict[str, Outcome]:
    """Every level's outcome, from the cache or from llama.cpp."""
    entries = sum(1 for names in header.converted.values() for name in names if name.startswith("blk."))
    found: dict[str, Outcome] = {}
    requests, places = {}, {}
    for level in blank.section.levels:
        metadata = blank.metadata(entries) if _uses_imatrix(level) else {}
        wanted = request(
            level,
            header.path,
            Path("/dev/null"),
            threads=1,
            tensor_types=blank.section.tensor_types,
            metadata=metadata,
            imatrix=ANY if metadata else None,
            dry_run=True,
        )
        known = {name: wanted[name] for name in ("ftype", "output_type", "tensor_types", "imatrix", "metadata")}
        known["quantizer"] = VERSION
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
        place = header.path.with_name(f"outcome-{digest}.json")
        try:
            data = json.loads(place.read_text(encoding="utf-8"))
            found[level] = Outcome(data["types"], tuple(data["fallbacks"]), data["nbytes"])
        except (OSError, ValueError, LookupError, TypeError):  # missing or damaged: run llama.cpp again
            requests[level], places[level] = wanted, place
    for level, outcome in predict(requests, header).items():
        data = {"types": dict(outcome.types), "fallbacks": list(outcome.fallbacks), "nbytes": outcome.nbytes}
        write_atomically(places[level], json.dumps(data).encode())
        found[level] = outcome
    return found
