"""A release repeated from its manifests, and its files compared with theirs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.building.run import build_recipe
from quantize.dist.manifest import MANIFEST_NAME, Manifest, described_files, read_manifest
from quantize.engines import NATIVE
from quantize.errors import ManifestError, RecipeError
from quantize.files.digest import sha256_of_file
from quantize.files.inside import stray
from quantize.options import BuildOptions, RebuildOptions
from quantize.planning.circumstances import difference
from quantize.planning.keys import differences
from quantize.rebuilding.recorded import lacking
from quantize.recipe import load_recipe
from quantize.recipe.levels import MMPROJ
from quantize.reporter import SILENT, Reporter

SETTINGS = ("compute_dtype", "batch_tokens")


@dataclass(frozen=True)
class Compared:
    """One branch, or the levels of a GGUF repo, beside what was built again.

    Attributes:
        label: such as ``gptq/main``. equal, differing, missing: names of files.
        changed: versions and circumstances that are others now, a line each.
    """

    label: str
    equal: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        return not (self.differing or self.missing)


def find_manifests(target: Path) -> list[Path]:
    """The manifest that ``target`` is, or all those below it.

    Raises:
        ManifestError: there is none.
    """
    if target.is_file():
        return [target]
    found = sorted(path for path in target.rglob(MANIFEST_NAME) if ".quantize" not in path.parts)
    if not found:
        raise ManifestError(f"{target}: no {MANIFEST_NAME} is there; name a manifest, or a folder of finished branches")
    return found


def rebuild(
    target: Path,
    options: RebuildOptions | None = None,
    reporter: Reporter = SILENT,
) -> list[Compared]:
    """Build again what the manifests at ``target`` say, from one pass, and compare every file's hash.

    Args:
        options: where the source and the texts are, and where to build.

    Raises:
        ManifestError: the manifests are not of one release, or lack something. QuantizeError: as a build.
    """
    options = options or RebuildOptions()
    places = find_manifests(target)
    manifests = [_read(path) for path in places]
    data = recorded_recipe(manifests, places, options.source, options.text)
    if options.trust_remote_code:
        data["model"]["trust_remote_code"] = True
    with tempfile.TemporaryDirectory(prefix="quantize-rebuild-") as scratch:
        recipe = Path(scratch) / "rebuild.json"
        recipe.write_text(json.dumps(data), encoding="utf-8")
        try:
            loaded = load_recipe(recipe)
        except RecipeError as error:
            reason = str(error).partition(f"{recipe.name}:")[2].partition(": ")[2] or str(error)
            raise ManifestError(f"{places[0]}: no recipe can be made of it: {reason}") from None
        dist = options.into or Path(scratch) / "dist"
        how = BuildOptions(dist=dist, device=options.device, shards=_shards(manifests, places))
        plan = build_recipe(loaded, how, reporter).plan
        folders = {f"{item.label.partition('/')[0]}/{item.branch}": item.folder for item in plan.variants}
        if plan.gguf:
            folders["gguf/main"] = plan.gguf.folder
        return [_compare(manifest, folders[_label(manifest)]) for manifest in manifests]


def recorded_recipe(
    manifests: Sequence[Manifest], places: Sequence[Path], source: str | None, texts: Sequence[Path]
) -> dict[str, Any]:
    """The recipe that manifests were made by, as far as their files depend on it."""
    first = manifests[0]
    for manifest, place in zip(manifests, places, strict=True):
        if manifest["source"]["files"] != first["source"]["files"]:
            raise ManifestError(f"{place}: is of another source than {places[0]}; rebuild them one at a time")
    named = source or (first["source"]["name"] if first["source"]["commit"] else None)
    if named is None:
        raise ManifestError(
            f"{places[0]}: was made from '{first['source']['name']}', which is no hub id; say with --source where it is"
        )
    calibrations = [found for found in map(_calibration_of, manifests) if found]
    if any(found != calibrations[0] for found in calibrations):
        raise ManifestError("the manifests were calibrated differently; rebuild them one at a time")
    recipe: dict[str, Any] = {
        "model": {"source": named, "license": "other", "creator": "rebuild"},
        "release": {"repo": _repo_template(first)},
    }
    if first["source"]["commit"]:
        recipe["model"]["revision"] = first["source"]["commit"]
    if calibrations:
        recipe["calibration"] = _calibration(calibrations[0], texts, places[0])
    for manifest in manifests:
        if "levels" in manifest:
            _add_levels(recipe, manifest, places[manifests.index(manifest)].parent)
            continue
        inputs = manifest["key_inputs"]
        settings = dict(inputs["method"])
        section = recipe.setdefault(settings.pop("name"), {**settings, "variants": []})
        engine = manifest["engine"]["name"] if manifest.get("engine") else NATIVE
        section["variants"].append({**inputs["parameters"], "branch": manifest["branch"], "engine": engine})
        recipe["release"]["max_shard_size"] = inputs["max_shard_size"]
        if not manifest.get("engine"):
            recipe["calibration"] |= _as_computed(manifest["compute"])
    return recipe


def _as_computed(compute: Mapping[str, Any]) -> dict[str, Any]:
    """What ``auto`` was, and how many tokens ran together."""
    names = {"dtype": "compute_dtype", "batch_tokens": "batch_tokens"}
    return {key: compute[name] for name, key in names.items() if name in compute}


def _shards(manifests: Sequence[Manifest], places: Sequence[Path]) -> int:
    """Parts that the windows were run in, which decides the last bits of our own statistics."""
    parts = [
        _part(manifest, "imatrix" if "levels" in manifest else "compute")
        for manifest in manifests
        if not manifest.get("engine")
    ]
    found = [int(part.get("shards", 1)) for part in parts if part]
    if len(set(found)) > 1:
        raise ManifestError(
            f"{places[0].parent.parent}: its manifests were calibrated in different numbers of shards "
            f"({', '.join(map(str, sorted(set(found))))}); rebuild them one at a time"
        )
    return found[0] if found else 1


def _read(path: Path) -> Manifest:
    manifest = read_manifest(path.parent) if path.name == MANIFEST_NAME else None
    if manifest is None:
        raise ManifestError(f"{path}: is no manifest that can be read; name a {MANIFEST_NAME} or its folder")
    if wrong := lacking(manifest):
        raise ManifestError(f"{path}: does not say what it was made of ({wrong}), so it cannot be made again")
    return manifest


def _part(manifest: Manifest, name: str) -> dict[str, Any]:
    part: dict[str, Any] = dict(manifest).get(name) or {}  # type: ignore[assignment]
    return part


def _label(manifest: Manifest) -> str:
    return "gguf/main" if "levels" in manifest else f"{manifest['key_inputs']['method']['name']}/{manifest['branch']}"


def _calibration_of(manifest: Manifest) -> Mapping[str, Any] | None:
    """Of a branch, or of the importance matrix of levels; None where nothing was calibrated."""
    if "levels" not in manifest:
        found: Mapping[str, Any] = manifest["key_inputs"]["calibration"]
        return found
    inputs = (manifest.get("imatrix") or {}).get("key_inputs") or {}
    if "calibration" not in inputs:
        return None
    return {**inputs["calibration"], **{name: inputs[name] for name in SETTINGS if name in inputs}}


def _calibration(recorded: Mapping[str, Any], texts: Sequence[Path], place: Path) -> dict[str, Any]:
    known = {sha256_of_file(path): path for path in texts}
    dataset: list[dict[str, Any]] = []
    for corpus in recorded["corpora"]:
        if "preset" in corpus:
            dataset.append({"preset": corpus["preset"]})
        elif "hub" in corpus:
            hub = dict(corpus["hub"])
            dataset.append({"hub": hub.pop("name"), **{key: value for key, value in hub.items() if value}})
        elif corpus["file_sha256"] in known:
            column = {"column": corpus["column"]} if corpus["column"] else {}
            dataset.append({"file": str(known[corpus["file_sha256"]].resolve()), **column})
        else:
            raise ManifestError(
                f"{place}: was calibrated on a text file of SHA-256 {corpus['file_sha256'][:12]}…; give it with --text"
            )
    names = ("samples", "sequence_length", "seed", *SETTINGS)
    return {"dataset": dataset, **{name: recorded[name] for name in names if name in recorded}}


def _repo_template(manifest: Manifest) -> str:
    """A template that gives the manifest's own repo name for its method."""
    repo = str(manifest["repo"])
    method = _label(manifest).partition("/")[0]
    for word, place in ((method.upper(), "{METHOD}"), (method, "{method}")):
        before, found, after = repo.rpartition(word)
        if found:
            return f"{before}{place}{after}"
    raise ManifestError(f"the repo name '{repo}' does not hold its method, {method}")


def _add_levels(recipe: dict[str, Any], manifest: Manifest, folder: Path) -> None:
    inputs = {level: entry["key_inputs"] for level, entry in manifest["levels"].items()}
    one = next((entry for level, entry in inputs.items() if level != MMPROJ), next(iter(inputs.values())))
    conversion, author = one["conversion"], one["conversion"]["authorship"]
    section = recipe["gguf"] = {
        "levels": [level for level in inputs if level != MMPROJ],
        "mmproj": MMPROJ in inputs,
        "nextn": conversion.get("nextn", True),
        "intermediate": conversion["outtype"].upper(),
        "tensor_types": one["tensor_types"],
        "max_file_size": one["max_file_size"],
        "imatrix": any(entry["imatrix"] for entry in inputs.values()),
        "solve": "error_feedback" if any(entry.get("solve") for entry in inputs.values()) else "llama.cpp",
    }
    matrix = manifest.get("imatrix") or {}
    if "sha256" in (matrix.get("key_inputs") or {}):
        file = folder / next(iter(matrix["files"]))
        if (reason := stray(file, folder)) is not None:
            raise ManifestError(f"{file}: {reason}; put the importance matrix itself there")
        section["imatrix"] = str(file.resolve())
    model, release = recipe["model"], recipe["release"]
    model["name"] = conversion["name"]
    for key, name in (("general.license", "license"), ("general.author", "creator")):
        model.pop(name, None)
        if key in author:
            model[name] = author[key]
    if bases := author.get("general.base_models"):
        model["base_model"] = "/".join(bases[0]["repo_url"].split("/")[-2:])
    release["quantized_by"] = author["general.quantized_by"]


def _compare(manifest: Manifest, folder: Path) -> Compared:
    again = read_manifest(folder) or {}
    made, result = described_files(again), Compared(_label(manifest))
    for name, entry in described_files(manifest).items():
        if name not in made:
            result.missing.append(name)
        elif made[name]["sha256"] == entry["sha256"]:
            result.equal.append(name)
        else:
            result.differing.append(name)
    for part in ("versions", "compute", "imatrix"):
        before, now = (_part(data, part) for data in (manifest, again))
        if part == "imatrix":
            before, now = ((one.get("compute") or {}) for one in (before, now))
            now = now if before else {}  # an older manifest does not say
        names = sorted({*before, *now})
        result.changed.extend(
            difference(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)
        )
    result.changed.extend(
        f"engine {line}" for line in differences(manifest.get("engine") or {}, again.get("engine") or {})
    )
    tokens = [(data.get("calibration") or {}).get("tokens_sha256") for data in (manifest, again)]
    if tokens[0] != tokens[1]:
        result.changed.append("the calibration tokens are others")
    return result
