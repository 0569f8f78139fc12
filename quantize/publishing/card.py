"""Model cards, rendered from templates. Untrusted input is passed to them as data, never as template code."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quantize import __version__
from quantize.calibration.corpus import title, url
from quantize.dist.layout import Dist
from quantize.dist.manifest import Recorded, read_manifest
from quantize.engines import NATIVE
from quantize.errors import RecipeError, shortened
from quantize.formats.tensors import DTYPE_BYTES
from quantize.planning.engines import layout_of
from quantize.planning.items import PlannedLevel, PlannedVariant
from quantize.planning.left import grouped
from quantize.planning.plan import Plan
from quantize.publishing.bounds import out_of_bounds
from quantize.publishing.finished import LICENCE_FILES
from quantize.publishing.picture import FILE, FORMER_FILES, draw
from quantize.publishing.prompt import Prompt, find_prompt, prompt_as_python
from quantize.publishing.quality import cells, fit, loads_in, measured, summary
from quantize.publishing.signature import sign
from quantize.publishing.source_card import HUB, absolute_links, source_card, text_of, texts_of
from quantize.recipe.levels import LEVELS
from quantize.recipe.methods import AwqVariant, GptqVariant, Method
from quantize.source.resolved import Source

OURS = f"quantize {__version__}"


def licence_files(source: Source) -> list[str]:
    """The source's licence files, which go into everything derived from it."""
    return [name for name in source.hashes if name.lower().startswith(LICENCE_FILES)]


def render_card(plan: Plan, method: Method) -> str:
    """``README.md`` of every branch of a method's repo: metadata, provided files, how to use."""
    return _render(plan, method, "transformers", [_row(plan, item) for item in plan.of(method)])


def render_gguf_card(plan: Plan) -> str:
    """``README.md`` of the GGUF repo."""
    assert plan.gguf
    whole = read_manifest(plan.gguf.folder) or {}
    manifest = whole.get("levels") or {}
    elements = sum(spec.nbytes // DTYPE_BYTES[spec.dtype] for spec in plan.source.checkpoint.tensors.values())
    rows, split = [], False
    projector = next((item for item in plan.gguf.levels if item.is_projector), None)
    for item in plan.gguf.levels:
        if item is projector:
            continue
        files = manifest.get(item.level, {}).get("files") or {}
        nbytes = sum(file["bytes"] for file in files.values()) or item.nbytes
        first = min(files, default=item.file)
        split = split or len(files) > 1
        rows.append({
            "file": first,
            "files": sorted(files),
            "link": f"{HUB}/{item.repo}/blob/main/{first}",
            "level": item.level,
            "bits": f"{8 * nbytes / elements:.2f}",
            "size": f"{nbytes / 1e9:.2f} GB",
            "use": LEVELS[item.level].use,
            "loads": loads_in(whole, first),
            **cells((manifest.get(item.level) or {}).get("quality")),
        })  # fmt: skip
    # the level that most people use, if it is there
    example = next((row for row in rows if row["level"] == "Q4_K_M"), rows[0])
    notes = [*plan.gguf.notes, *(whole.get("conversion") or {}).get("notes", ())]
    solved = [item.level for item in plan.gguf.levels if _by_error_feedback(item, manifest.get(item.level))]
    more = {
        "solved": "all levels" if len(solved) == len(rows) else ", ".join(solved),
        "notes": [note[0].upper() + note[1:] for note in dict.fromkeys(notes)],
        "projector": projector and {
            "file": projector.file,
            "link": f"{HUB}/{projector.repo}/blob/main/{projector.file}",
            "size": f"{projector.nbytes / 1e9:.2f} GB",
        },
    }  # fmt: skip
    return _render(plan, "gguf", "gguf", rows, imatrix=plan.gguf.imatrix_file, split=split, example=example, **more)


def _by_error_feedback(item: PlannedLevel, built: Recorded | None) -> bool:
    """Whether a level's file was solved with error feedback, or will be, where it is not built."""
    if built:
        return bool(built.get("solve") == "error_feedback")
    return bool(item.feedback and item.feedback.targets)


def render(plan: Plan, method: str) -> str:
    """The card of a method's repo.

    Raises:
        RecipeError: the recipe does not have the method, or its partial or template cannot be used.
    """
    if method not in plan.repos:
        raise RecipeError(f"the recipe has no `{method}:` section, and so no card for it")
    if method == "gguf":
        return render_gguf_card(plan)
    return render_card(plan, "gptq" if method == "gptq" else "awq")


def refresh_cards(plan: Plan, held: Dist) -> list[Path]:
    """Render the card and picture of every finished branch again, because a new branch changes all tables.

    Returns:
        The files that changed.
    """
    plan.require_own()
    cards = {method: render(plan, method).encode() for method in plan.repos}
    picture = draw(fit(measured(plan), out_of_bounds(plan)))
    pictures = {FILE: picture} if picture else {}
    changed = []
    for folder, method in {item.folder: item.method for item in plan.everything}.items():
        if read_manifest(folder) is None:  # not written by quantize: leave it alone
            continue
        for name, data in {"README.md": cards[method], **pictures}.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                held.write(path, data)
                changed.append(path)
        for name in [*FORMER_FILES, *([] if picture else [FILE])]:
            if (folder / name).is_file():  # its figures are outdated
                (folder / name).unlink()
                changed.append(folder / name)
    return changed


def _unchanged(plan: Plan) -> dict[str, Any]:
    """What stays in the source's dtype; names of tensors may come from anybody."""
    table = plan.table
    rows = [row for row in grouped(table.left) if row["in_blocks"]]
    return {
        "share": f"{table.share:.1%}",
        "left": [{**row, "name": _plain(row["name"])} for row in rows],
        "outside": [_plain(name) for name in table.outside],
    }


def _plain(name: str) -> str:
    return shortened(re.sub(r"[^A-Za-z0-9._-]", "?", name), 120)


def _render(plan: Plan, method: str, library: str, rows: list[dict[str, Any]], **more: Any) -> str:
    from huggingface_hub import ModelCardData

    recipe, source = plan.recipe, plan.source
    folder = source.checkpoint.folder or source.small_files
    front, original = source_card(folder)
    base = source.base_model
    if source.hub_id or base:
        original = absolute_links(original, source.hub_id or str(base), source.commit or "main")
    name = recipe.model.name or source.short_name
    licence = recipe.model.license or text_of(front, "license")
    own = recipe.model.prompt_template
    prompt = Prompt(own) if own else find_prompt(folder)
    template = prompt.text
    metadata = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        datasets=texts_of(front, "datasets") or None,
        inference=False,
        language=texts_of(front, "language") or None,
        library_name=library,
        license=licence,
        license_link=text_of(front, "license_link"),
        license_name=text_of(front, "license_name"),
        model_creator=recipe.model.creator,
        model_name=name,
        model_type=source.checkpoint.model_type,
        pipeline_tag=text_of(front, "pipeline_tag") or "text-generation",
        prompt_template=template,
        quantized_by=recipe.release.quantized_by or recipe.release.owner,
        tags=sorted({*texts_of(front, "tags"), method}),
    )
    try:
        return sign(
            _environment(recipe.release.templates)
            .get_template(f"{method}.md.j2")
            .render(
                metadata=metadata.to_yaml(line_break="\n").strip(),
                **_unchanged(plan),
                name=name,
                creator=recipe.model.creator,
                creator_url=f"{HUB}/{base.split('/')[0]}" if base and "/" in base else None,
                hub=HUB,
                repo=plan.repos[method],
                folder=plan.repos[method].rsplit("/", 1)[-1],
                siblings={other.upper(): repo for other, repo in plan.repos.items() if other != method},
                base_model=base,
                license=licence,
                license_link=text_of(front, "license_link"),
                licence_files=licence_files(source),
                prompt_template=template,
                prompt_reason=prompt.reason,
                prompt_python=prompt_as_python(template),
                fence=_fence(template or ""),
                rows=rows,
                quality=summary(measured(plan), out_of_bounds(plan)),
                loads=any(row["loads"] != "-" for row in rows),
                engines=sorted({row["engine"] for row in rows if row.get("engine", OURS) != OURS}),
                samples=recipe.calibration.samples,
                version=__version__,
                header=_partial(recipe.release.card_header),
                footer=_partial(recipe.release.card_footer),
                original=original,
                **more,
            )
        )
    except Exception as error:  # a publisher's template can raise anything
        if not recipe.release.templates:
            raise
        reason = str(error) or type(error).__name__
        raise RecipeError(f"release.templates: {method}.md.j2 cannot be rendered: {reason}") from None


@functools.cache
def _environment(own: str | None) -> Any:
    """Templates as they are compiled once; one that has changed on disk is read again."""
    from jinja2 import ChoiceLoader, FileSystemLoader, PackageLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    shipped = PackageLoader("quantize.publishing")
    return SandboxedEnvironment(
        loader=ChoiceLoader([FileSystemLoader(own), shipped]) if own else shipped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _partial(file: str | None) -> str | None:
    """A publisher's Markdown file, unchanged."""
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read for the card: {error}") from None


def _row(plan: Plan, item: PlannedVariant) -> dict[str, Any]:
    calibration, variant, known = plan.recipe.calibration, item.variant, plan.finished(item)
    datasets = [
        f"[{_cell(title(corpus))}]({quote(str(url(corpus)), ':/?=&')})" if url(corpus) else _cell(title(corpus))
        for corpus in calibration.dataset
    ]
    row = {
        "branch": item.branch,
        "link": f"{HUB}/{item.repo}/tree/{item.branch}",
        "bits": variant.bits,
        "group_size": "None" if variant.group_size == -1 else variant.group_size,
        "dataset": ", ".join(datasets),
        "length": calibration.sequence_length,
        "size": f"{item.nbytes / 1e9:.2f} GB",
        "loads": loads_in(known),
        "engine": _made_by(item, known),
        "format": item.format,
        **cells(known.get("quality")),
    }
    if isinstance(variant, GptqVariant):
        exllama = variant.bits == 4 and plan.source.checkpoint.model_type in {"llama", "mistral"}
        return row | {
            "order": {True: "Yes", False: "No", "static": "Static"}[variant.desc_act],
            "damp": f"{variant.damp_percent:g}{_damping(known)}",
            "exllama": "Yes" if exllama and item.format == "gptq" else "No",
            "description": _gptq_description(variant),
        }
    return row | {"zero_point": "Yes" if variant.zero_point else "No", "description": _awq_description(variant)}


def _damping(known: Recorded) -> str:
    """What the damping is a share of, as the solves of a built branch recorded it."""
    rules = sorted({entry["damping"] for entry in known.get("ledger", ()) if entry.get("damping")})
    return f" {' or '.join(rules)}" if rules else ""


def _fence(text: str) -> str:
    """A fence of backticks that no line of the text can close."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])


def _cell(text: str) -> str:
    """A text escaped for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _made_by(item: PlannedVariant, known: Recorded) -> str:
    """The engine and its version, from the manifest if the branch is built."""
    if item.engine is None:
        return OURS
    made = known.get("engine") or {}
    return f"{made['name']} {made['version']}" if made else item.engine.title


def _group(group_size: int) -> str:
    return "no group size, for the lowest memory use" if group_size == -1 else f"group size {group_size}"


def _gptq_description(variant: GptqVariant) -> str:
    order = {
        True: "with act-order, for higher accuracy",
        False: "without act-order, read by every loader",
        "static": "with static act-order: its accuracy, and read by every loader",
    }[variant.desc_act]
    grid = "" if variant.sym else " Asymmetric grid."
    own = " Calibrated on its own quantized activations." if variant.propagate == "quantized" else ""
    own += " In the compressed-tensors format, for vLLM." if layout_of(variant) == "compressed-tensors" else ""
    return f"{variant.bits}-bit, {_group(variant.group_size)}, {order}.{grid}{own}"


def _awq_description(variant: AwqVariant) -> str:
    grid = "" if variant.zero_point else " Symmetric grid."
    if variant.engine != NATIVE:
        return f"{variant.bits}-bit, {_group(variant.group_size)}.{grid}"
    rounding = "rounded by GPTQ" if variant.rounding == "gptq" else "rounded to nearest"
    return f"{variant.bits}-bit, {_group(variant.group_size)}, scaled by activation and {rounding}.{grid}"
