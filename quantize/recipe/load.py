"""Load a recipe file into a validated :class:`~quantize.recipe.schema.Recipe`.

The order: read the YAML with line numbers, merge it over what it ``extends``, apply ``--set``, validate, expand
the matrix and name the branches. Each error names file, line and key.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from quantize.engines import NATIVE, find_engine
from quantize.errors import RecipeError, shortened, shortly
from quantize.recipe.engine_fit import fitted
from quantize.recipe.located import Key, Located, merge, read_located, set_value
from quantize.recipe.methods import Awq, AwqVariant, Gptq, GptqVariant, Method, Strict, Variant
from quantize.recipe.presets import PRESETS
from quantize.recipe.schema import Recipe
from quantize.recipe.shipped import find_shipped

BOTH = (True, False)
MOST_VARIANTS = 256  # a matrix of long lists multiplies quickly
MOST_PARENTS = 16
MOST_SAID = 300  # characters of a validation message, which repeats the value


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and the tree it came from, with which later errors name file and line.

    Attributes:
        recipe: the validated data; every variant is explicit and has its ``branch``.
        located: the merged tree with the place of each value.
        variant_places: by method, the key path that each variant comes from.
        name: the recipe's name in messages.
    """

    recipe: Recipe
    located: Located
    variant_places: Mapping[Method, tuple[tuple[Key, ...], ...]]
    name: str

    def error(self, path: Iterable[Key], message: str) -> RecipeError:
        return self.located.error(path, message)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load, merge, validate and expand a recipe.

    Args:
        path: a recipe file, or the name of a shipped recipe (``demo``).
        overrides: ``key.path=value`` assignments, applied last.

    Raises:
        RecipeError: it is invalid; the message is one sentence that names file, line and key.
    """
    file = _find(os.fspath(path))
    located = _read_extended(file, ())
    for assignment in overrides:
        set_value(located, assignment)
    located.data.pop("extends", None)
    _resolve_paths(located)
    try:
        recipe = Recipe.model_validate(located.data)
    except ValidationError as error:
        raise _first_error(located, error) from None
    _check_presets(located, recipe)
    if not recipe.methods and recipe.gguf is None:
        raise located.error((), "asks for nothing; give it a `gptq:`, `awq:` or `gguf:` section")
    sections: dict[str, Any] = {}
    places = {}
    for method in recipe.methods:
        variants, places[method] = _expand(located, recipe, method)
        sections[method] = recipe.section(method).model_copy(update={"variants": variants, "matrix": None})
    return LoadedRecipe(recipe.model_copy(update=sections), located, places, os.fspath(path))


def _find(path: str) -> Path:
    if os.path.isfile(path):  # unlike pathlib's, it accepts names of any length
        return Path(path)
    shipped = find_shipped(path)
    if shipped is not None:
        return shipped
    if os.path.isdir(path):
        raise RecipeError(f"{path}: is a directory; name a recipe file in it")
    raise RecipeError(f"{path}: no such recipe file; `quantize recipes` lists the shipped ones")


def _read_extended(file: Path, chain: tuple[Path, ...]) -> Located:
    tree = read_located(file, os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file))
    parent = tree.data.get("extends")
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise tree.error(("extends",), "must be the path or the name of one recipe")
    target = file.parent / parent
    found = target if os.path.isfile(target) else find_shipped(parent)
    if found is None:
        raise tree.error(("extends",), f"no recipe file '{parent}' beside this one, and none shipped")
    chain = (*chain, file.resolve())
    if found.resolve() in chain:
        raise tree.error(("extends",), f"'{parent}' extends this recipe in turn; a recipe cannot extend itself")
    if len(chain) > MOST_PARENTS:
        raise tree.error(("extends",), f"is the last of more than {MOST_PARENTS} recipes that extend each other")
    return merge(_read_extended(found, chain), tree)


def _resolve_paths(located: Located) -> None:
    """Make local paths absolute; they are relative to the recipe file that contains them."""

    def resolve(path: tuple[Key, ...], value: str) -> str:
        origin = located.place(path).origin
        if not value:
            return value
        base = Path.cwd() if origin.startswith("--set") else Path(origin).parent
        local = os.path.join(base, os.path.expanduser(value))
        explicit = value.startswith(("/", "./", "../", "~")) or value in {".", ".."}
        return os.path.abspath(local) if explicit or os.path.exists(local) else value

    data = located.data
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("source"), str) and ":" not in model["source"]:
        model["source"] = resolve(("model", "source"), model["source"])
    release = data.get("release")
    if isinstance(release, dict):
        for key in ("templates", "card_header", "card_footer"):
            if isinstance(release.get(key), str):
                release[key] = resolve(("release", key), release[key])
    levels = data.get("gguf")
    if isinstance(levels, dict) and isinstance(levels.get("imatrix"), str):
        levels["imatrix"] = resolve(("gguf", "imatrix"), levels["imatrix"])
    for section in ("calibration", "measure"):
        part = data.get(section)
        if not isinstance(part, dict):
            continue
        dataset = part.get("dataset")
        for holder, key in _corpus_slots(part, dataset):
            value = holder[key]
            if isinstance(value, str) and (holder is not part or isinstance(dataset, str)):
                holder[key] = value if value in {*PRESETS, "auto"} else resolve((section, "dataset"), value)


def _corpus_slots(calibration: dict[str, Any], dataset: Any) -> list[tuple[Any, Any]]:
    if isinstance(dataset, str):
        return [(calibration, "dataset")]
    if isinstance(dataset, dict):
        return [(dataset, "file")] if "file" in dataset else []
    if isinstance(dataset, list):
        slots: list[tuple[Any, Any]] = []
        for index, item in enumerate(dataset):
            slots += [(dataset, index)] if isinstance(item, str) else _corpus_slots({}, item)
        return slots
    return []


def _check_presets(located: Located, recipe: Recipe) -> None:
    asked = [("calibration", index, corpus) for index, corpus in enumerate(recipe.calibration.dataset)]
    asked += [("measure", index, corpus) for index, corpus in enumerate(recipe.measure.dataset or [])]
    for section, index, corpus in asked:
        if corpus.preset is not None and corpus.preset not in PRESETS:
            hint = _nearest(corpus.preset, PRESETS)
            raise located.error(
                _known(located, (section, "dataset", index)),
                f"no preset '{corpus.preset}'{hint}; presets are {', '.join(PRESETS)}, a hub dataset is "
                "written org/name, a file ./name.txt",
            )


def _first_error(located: Located, error: ValidationError) -> RecipeError:
    details = sorted(error.errors(), key=lambda item: located.place(_known(located, item["loc"])).line or 0)
    first = details[0]
    path = _known(located, first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return located.error((*path[:-1], key), f"unknown key{_nearest(key, _fields(first['loc'][:-1]))}")
    if first["type"] == "missing":
        return located.error(path, f"needs the key '{first['loc'][-1]}'")
    return located.error(path, _sentence(first))


def _known(located: Located, loc: Sequence[Key]) -> tuple[Key, ...]:
    """The part of a pydantic location that exists in the YAML, without union tags and added indices."""
    path: tuple[Key, ...] = ()
    for key in loc:
        if (*path, key) in located.places:
            path = (*path, key)
    return path


def _sentence(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    given = shortly(details.get("input"))
    if kind == "value_error":
        return shortened(str(context["error"]), MOST_SAID)
    if kind == "literal_error":
        return f"must be {context['expected']}, not {given}"
    if kind in {"too_short", "string_too_short"}:
        return "must not be empty"
    if kind == "model_type":
        return f"must be a mapping of keys to values, not {given}"
    message = details["msg"].removeprefix("Input ").removeprefix("should ")
    message = message[0].lower() + message[1:]
    return f"must {message}, not {given}" if details["msg"].startswith("Input should") else message


def _fields(loc: Sequence[Key]) -> list[str]:
    """The keys that the schema allows at a pydantic location."""
    model: Any = Recipe
    for key in loc:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(key) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            continue
        model = _model_in(field.annotation)
    known = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    return [*known, "extends"] if not loc else known


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


VARIANTS: dict[Method, type[Variant]] = {"gptq": GptqVariant, "awq": AwqVariant}


def _expand(located: Located, recipe: Recipe, method: Method) -> tuple[list[Variant], tuple[tuple[Key, ...], ...]]:
    """Explicit variants, then the matrix's other combinations; all with a branch."""
    section, kind = recipe.section(method), VARIANTS[method]
    defaults = {name: getattr(section, name) for name in kind.model_fields if name != "branch"}
    found: list[tuple[Variant, tuple[Key, ...]]] = []
    if len(section.variants) > MOST_VARIANTS:
        raise located.error(
            (method, "variants"), f"has {len(section.variants):,}; a release has at most {MOST_VARIANTS}"
        )
    for index, asked in enumerate(section.variants):
        given = {name: getattr(asked, name) for name in asked.model_fields_set}
        place: tuple[Key, ...] = (method, "variants", index)
        found.append(
            (kind(**fitted(located, method, section, values={**defaults, **given}, given=given, place=place)), place)
        )
    count = math.prod(len(values) for values in _axes(section.matrix).values())
    if count > MOST_VARIANTS:
        raise located.error((method, "matrix"), f"has {count:,} combinations; a release has at most {MOST_VARIANTS}")
    for combination in _combinations(section.matrix):
        try:
            variant = kind(**{**defaults, **combination})
            variant = kind(
                **fitted(located, method, section, values=dict(variant), given=combination, place=(method, "matrix"))
            )
        except ValidationError as error:
            key = error.errors()[0]["loc"][0]
            raise located.error((method, "matrix", key), _sentence(error.errors()[0])) from None
        if not any(_parameters(variant) == _parameters(known) for known, _ in found):
            found.append((variant, (method, "matrix")))
    if not found:
        raise located.error((method,), "lists no variants; give `variants:` or `matrix:`")
    named: dict[str, tuple[Key, ...]] = {}
    variants = []
    main_is_free = all(variant.branch != "main" for variant, _ in found)
    for index, (variant, place) in enumerate(found):
        branch = variant.branch or ("main" if index == 0 and main_is_free else branch_name(variant, section))
        other = next((known for known in named if known.lower() == branch.lower()), None)
        if other is not None:
            raise located.error(
                place,
                f"gives the branch '{branch}', as line {located.place(named[other]).line} does; "
                "give one of them another `branch:`, or remove it",
            )
        named[branch] = place
        variants.append(variant.model_copy(update={"branch": branch}))
    return variants, tuple(named.values())


def branch_name(variant: Variant, defaults: Gptq | Awq) -> str:
    """The customary names, ``gptq-4bit-32g-actorder_True`` and ``awq-4bit-64g``, with unusual choices appended."""
    if isinstance(variant, GptqVariant):
        order = "static" if variant.desc_act == "static" else str(variant.desc_act)
        name = f"gptq-{variant.bits}bit-{variant.group_size}g-actorder_{order}"
        name += "" if variant.sym else "-asym"
    else:
        name = f"awq-{variant.bits}bit-{variant.group_size}g"
        name += "" if variant.zero_point else "-sym"
    method: Method = "gptq" if isinstance(variant, GptqVariant) else "awq"
    # settings that an external engine fixes are implied by its name
    own_ways = {} if variant.engine == NATIVE else find_engine(variant.engine).methods[method].values
    if isinstance(variant, AwqVariant) and variant.rounding != getattr(defaults, "rounding", None) and not own_ways:
        name += f"-rounding_{variant.rounding}"
    if variant.damp_percent != defaults.damp_percent and "damp_percent" not in own_ways:
        name += f"-damp_{variant.damp_percent:g}"
    if variant.damping != defaults.damping and "damping" not in own_ways:
        name += f"-damping_{variant.damping}"
    for step in ("mse", "signed_scales", "polish"):
        if getattr(variant, step) != getattr(defaults, step) and len(own_ways.get(step, BOTH)) > 1:
            name += f"-{step}_{getattr(variant, step)}"
    if variant.engine != defaults.engine:
        name += f"-{variant.engine}"
    return name


def _axes(matrix: Strict | None) -> dict[str, list[Any]]:
    if matrix is None:
        return {}
    return {name: getattr(matrix, name) for name in type(matrix).model_fields if getattr(matrix, name)}


def _combinations(matrix: Strict | None) -> list[dict[str, Any]]:
    axes = _axes(matrix)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []


def _parameters(variant: Variant) -> dict[str, Any]:
    return variant.model_dump(exclude={"branch"})
