"""Check the card and the files inherited from the source: front matter, licence, sizes, tokenizer, chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantize.errors import shortly
from quantize.linting.files import RepoFiles
from quantize.linting.findings import Finding, capped, error, note, warning
from quantize.publishing.finished import LICENCE_FILES
from quantize.publishing.source_card import front_matter

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
CHATTY = re.compile(r"(?i)(?:^|[-_./])(chat|instruct|it|assistant|sft|dpo|rlhf)(?:$|[-_.\d])")
SIZE = re.compile(r"^\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(KB|MB|GB|TB)\s*$")
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
RELATIVE_LINK = re.compile(r"\]\((?!https?:|mailto:|#|/)([^)\s#?]+)")
SIZE_TOLERANCE = 0.02
MOST_BODY = 1_000_000
"""Characters of a card's text that are checked; the longest real ones have some ten thousand."""


def check_card(files: RepoFiles, kind: str) -> Iterator[Finding]:
    """Every finding about ``README.md`` that needs no other repo.

    Args:
        kind: ``gguf``, or the quantization method.
    """
    text = files.text("README.md")
    if text is None:
        yield error("card-missing", "README.md", "is missing; write a card that names base model, licence and use")
        return
    front, body = front_matter(text)
    if front is None:
        yield error("card-metadata", "README.md", "has no readable front matter for the hub; add it at the top")
        return
    base = front.get("base_model")
    if not base:
        yield error("base-model", "README.md:base_model", "is missing; the hub then does not list this as a derivative")
    elif base == files.name:
        yield error("base-model", "README.md:base_model", "is this repo itself; name the original model")
    elif front.get("base_model_relation") != "quantized":
        yield note("base-model-relation", "README.md:base_model_relation", "is not 'quantized'; the hub has to guess")
    licence = front.get("license")
    if not licence:
        yield error("licence", "README.md:license", "is missing; nobody can tell whether the model may be used")
    elif licence == "other" and not (front.get("license_name") and front.get("license_link")):
        yield warning("licence", "README.md:license_name", "'other' needs license_name and license_link")
    library = front.get("library_name")
    expected = "gguf" if kind == "gguf" else "transformers"
    if library and library != expected:
        yield warning("library", "README.md:library_name", f"is {shortly(library)}, the files are for {expected}")
    if not front.get("pipeline_tag"):
        yield note("pipeline-tag", "README.md:pipeline_tag", "is missing; searches for text-generation do not find it")
    yield from capped(_check_table(files, body[:MOST_BODY]))
    yield from capped(_check_links(files, body[:MOST_BODY]))


def check_tokenizer(files: RepoFiles) -> Iterator[Finding]:
    """Every finding about the tokenizer's files."""
    if not any(name in files.sizes for name in TOKENIZERS):
        yield error("tokenizer-missing", "tokenizer.json", "is missing, and no other tokenizer is here")
        return
    if "tokenizer_config.json" not in files.sizes:
        yield warning("tokenizer-config", "tokenizer_config.json", "is missing; special tokens and template are lost")
    if CHATTY.search(files.name) and not _has_template(files):
        yield warning(
            "chat-template", "chat_template.jinja", "is missing, though the name suggests a chat model; servers need it"
        )
    rows = files.config.get("vocab_size")
    largest = _largest_token(files.json("tokenizer.json") or {})
    if isinstance(rows, int) and largest is not None and largest >= rows:
        yield warning(
            "vocabulary", "tokenizer.json", f"has token {largest}, but the embedding only {rows} rows; that token fails"
        )


def check_inherited(files: RepoFiles, source: RepoFiles, kind: str) -> Iterator[Finding]:
    """Findings about files that should have been copied from the source."""
    ours, _ = front_matter(files.text("README.md") or "")
    theirs, _ = front_matter(source.text("README.md") or "")
    for key in ("license", "license_name", "license_link"):
        here, there = (ours or {}).get(key), (theirs or {}).get(key)
        if there and here != there:
            yield error(
                "licence-not-inherited",
                f"README.md:{key}",
                f"is {shortly(here) if here else 'missing'}, {source.name} has {shortly(there)}",
            )
    for name in source.sizes:
        if name.lower().startswith(LICENCE_FILES) and name not in files.sizes:
            yield warning("licence-file", name, f"is in {source.name}, but not here; its terms require a copy")
    if kind != "gguf":
        if _has_template(source) and not _has_template(files):
            yield error("chat-template", "chat_template.jinja", f"{source.name} has one, this repo has none; copy it")
        for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
            if name in source.sizes and name not in files.sizes:
                yield warning("not-carried-over", name, f"is in {source.name}, but not here; copy it")


def base_model(files: RepoFiles) -> str | None:
    """The hub id that the card names as its source."""
    front, _ = front_matter(files.text("README.md") or "")
    base = (front or {}).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and base != files.name else None


def _check_links(files: RepoFiles, body: str) -> Iterator[Finding]:
    """Findings about links to missing files."""
    there = {"/".join(name.split("/")[:depth]) for name in files.sizes for depth in range(1, name.count("/") + 2)}
    for target in sorted(set(RELATIVE_LINK.findall(body))):
        if target.removeprefix("./").rstrip("/") not in there:
            yield warning("link", f"README.md:{target}", "is linked, but is not in this repo")


def _check_table(files: RepoFiles, body: str) -> Iterator[Finding]:
    """Findings about wrong sizes of this branch or its files in a table."""
    weights = sum(size for name, size in files.sizes.items() if name.endswith(".safetensors"))
    for line in body.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []
        sizes = [cell for cell in cells if SIZE.match(cell)]
        if not sizes:
            continue
        named = re.sub(r"^\[([^\]]*)\].*$", r"\1", cells[0]).strip("` ")
        real = files.sizes.get(named) or (weights if named == (files.branch or "main") else 0)
        match = SIZE.match(sizes[0])
        assert match
        stated = float(match[1]) * UNITS[match[2]]
        if real and abs(stated - real) > max(SIZE_TOLERANCE * real, 0.5 * UNITS[match[2]] / 10 ** _digits(match[1])):
            yield warning("size", f"README.md:{named}", f"the card says {sizes[0]}, but it has {real / 1e9:.2f} GB")


def _digits(number: str) -> int:
    return len(number.partition(".")[2])


def _is_folder(files: RepoFiles, target: str) -> bool:
    prefix = target.removeprefix("./").rstrip("/") + "/"
    return any(name.startswith(prefix) for name in files.sizes)


def _has_template(files: RepoFiles) -> bool:
    if any(name in files.sizes for name in TEMPLATES) or _is_folder(files, "additional_chat_templates"):
        return True
    return bool((files.json("tokenizer_config.json") or {}).get("chat_template"))


def _largest_token(tokenizer: Mapping[str, Any]) -> int | None:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: list[int] = []
    if isinstance(vocabulary, dict):
        ids = [value for value in vocabulary.values() if isinstance(value, int)]
    elif isinstance(vocabulary, list):
        ids = [len(vocabulary) - 1]
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            ids.append(entry["id"])
    return max(ids, default=None)
