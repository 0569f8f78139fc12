"""Child process: run llama.cpp's converter on one model, with llama.cpp's tree first in ``sys.path``.

Keys of the arguments: ``model`` (a folder), ``out`` (a file), ``outtype``, ``name``, ``metadata`` (a JSON file with the
file's authorship keys), ``mode`` (``full`` or ``header``), ``part`` (``text``, or ``mmproj`` for the encoder and
projector of images or sound), ``nextn`` (whether layers that predict further tokens go into the file). ``header``
writes everything except tensor data, which is left as one large hole: enough for llama.cpp to report types and sizes.

The answer: ``architecture``; ``became``, the GGUF tensors that each tensor of the checkpoint went into; ``made_of``,
the reverse, in the order in which they were put together; ``notes``, what the converter was told to do differently for
this checkpoint; for a header also its size in bytes as llama.cpp's own writer counts it, and its keys.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NEXTN_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Keys of a config that count the layers that predict further tokens."""
_BLOCK = re.compile(r"^(?:(?:model|language_model|transformer)\.)*layers\.(\d+)\.")
_TOWER = re.compile(r"^((?:model\.)?vision_tower\.)((?:embeddings|encoder|post_layernorm|pre_layrnorm|head)\.)")
_MTP = re.compile(r"(^|\.)mtp[._]")


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    gc.disable()  # what is imported stays: looking through it for cycles is a tenth of this process's start
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    kinds = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    folder, mmproj = Path(arguments["model"]), arguments["part"] == "mmproj"
    with torch.inference_mode():
        _read_whole_config(ModelBase)
        hparams = ModelBase.load_hparams(folder, False)
        architecture = get_model_architecture(hparams, ModelType.MMPROJ if mmproj else ModelType.TEXT)
        try:
            converter_class = get_model_class(architecture, mmproj=mmproj)
        except NotImplementedError:
            raise RuntimeError(f"Model {architecture} is not supported") from None
        notes = [] if mmproj else _choose_nextn(ModelBase, converter_class, folder, hparams, arguments["nextn"])
        trace = Trace(ModelBase, gguf.GGUFWriter, _older_names(folder) if mmproj else str)
        found: dict[str, Any] = {}
        if arguments["mode"] == "header":
            _write_hollow(gguf.GGUFWriter, found)
        converter = converter_class(
            folder, kinds[arguments["outtype"]], Path(arguments["out"]),
            model_name=arguments["name"], metadata_override=Path(arguments["metadata"]),
        )  # fmt: skip
        gc.freeze()
        gc.enable()
        converter.write()
    made_of = {target: names for target, names in trace.made_of.items() if names}
    became: dict[str, list[str]] = {}
    for target, names in made_of.items():
        for name in names:
            became.setdefault(name, []).append(target)
    return {"architecture": architecture, "became": became, "made_of": made_of, "notes": notes, **found}


class Trace:
    """Which tensors of the checkpoint each tensor of the file is computed from.

    The converter computes lazily: a tensor that it hands to the writer holds the graph of its computation, and the
    leaves are what it read. Several converters delegate to an inner one, so their common base class is changed.

    Attributes:
        made_of: names in the checkpoint by names in the file, in the order of the graph, such as that of a stack.

    Args:
        base, writer: the converters' base class, and the class that writes files. known_as: what the converter calls a
            tensor of the checkpoint.
    """

    def __init__(self, base: Any, writer: Any, known_as: Callable[[str], str]) -> None:
        self.made_of: dict[str, list[str]] = {}
        self._current: str | None = None  # of the tensor being converted, for one that was computed at once
        index, prepare, add = base.index_tensors, base.prepare_tensors, writer.add_tensor

        def index_tensors(converter: Any, *arguments: Any, **options: Any) -> Any:
            choose = converter.filter_tensors

            def filter_tensors(item: tuple[str, Callable[[], Any]]) -> Any:
                name, read = item
                chosen = choose((known_as(name), self._named(name, read)))
                if chosen is not None:
                    originals[chosen[0]] = name
                return chosen

            converter.filter_tensors = filter_tensors
            return index(converter, *arguments, **options)

        def prepare_tensors(converter: Any) -> None:
            modify = converter.modify_tensors

            def modify_tensors(data: Any, name: str, bid: int | None) -> Iterator[Any]:
                self._current = originals.get(name)
                yield from modify(data, name, bid)
                self._current = None

            converter.modify_tensors = modify_tensors
            prepare(converter)

        def add_tensor(file: Any, name: str, tensor: Any, *arguments: Any, **options: Any) -> None:
            leaves = list(dict.fromkeys(_leaves(tensor)))
            self.made_of[name] = leaves or ([self._current] if self._current else [])
            add(file, name, tensor, *arguments, **options)

        originals: dict[str, str] = {}
        base.index_tensors, base.prepare_tensors, writer.add_tensor = index_tensors, prepare_tensors, add_tensor

    @staticmethod
    def _named(name: str, read: Callable[[], Any]) -> Callable[[], Any]:
        def reading() -> Any:
            tensor = read()
            if hasattr(tensor, "_args"):
                tensor._checkpoint_name = name
            return tensor

        return reading


def _leaves(item: Any) -> Iterator[str]:
    """Names of the checkpoint's tensors in a graph of lazy tensors, in its order. Iterative: graphs can be deep."""
    waiting, seen = [item], set()
    while waiting:
        now = waiting.pop()
        if isinstance(now, list | tuple):
            waiting.extend(reversed(now))
            continue
        known = getattr(now, "__dict__", {})
        if "_args" not in known or id(now) in seen:
            continue
        seen.add(id(now))
        if name := known.get("_checkpoint_name"):
            yield name
        else:
            waiting.append(known["_args"])


def _read_whole_config(base: Any) -> None:
    """Give converters the keys of config.json that transformers' class of the config drops."""
    load = base.load_hparams

    def load_hparams(dir_model: Path, is_mistral_format: bool) -> Any:
        found = load(dir_model, is_mistral_format)
        path = dir_model / "config.json"
        if not is_mistral_format and path.is_file():
            _add_missing(found, json.loads(path.read_text(encoding="utf-8")))
        return found

    base.load_hparams = staticmethod(load_hparams)


def _add_missing(found: dict[str, Any], stored: dict[str, Any]) -> None:
    for key, value in stored.items():
        if key not in found:
            found[key] = value
        elif isinstance(value, dict) and isinstance(found[key], dict) and key.endswith("config"):
            _add_missing(found[key], value)


def _choose_nextn(base: Any, converter_class: Any, folder: Path, hparams: dict[str, Any], wanted: bool) -> list[str]:
    """Leave out the layers that predict further tokens where the checkpoint has none, or they are not wanted."""
    text = {**hparams, **(hparams.get("text_config") or {})}
    claims = any(text.get(key) for key in NEXTN_COUNTS)
    can_omit = bool(getattr(converter_class, "supports_mtp_export", False))
    if not (claims or can_omit):
        return []
    has = _has_nextn(folder, int(text.get("num_hidden_layers") or 0))
    if has and wanted:
        return []
    if can_omit:
        converter_class.no_mtp = True
    elif has:
        raise RuntimeError(
            "its converter cannot leave out the layers that predict further tokens; set gguf.nextn: true"
        )
    if claims and not has:
        load = base.load_hparams

        def load_hparams(*arguments: Any, **options: Any) -> Any:
            loaded = load(*arguments, **options)
            for part in (loaded, loaded.get("text_config") or {}):
                part.update({key: 0 for key in NEXTN_COUNTS if part.get(key)})
            return loaded

        base.load_hparams = staticmethod(load_hparams)
    if has:
        return ["the layers that predict further tokens (NextN, MTP) are left out: gguf.nextn is false"]
    return (
        ["the checkpoint has no layers that predict further tokens (NextN, MTP), so the GGUF has none"]
        if claims
        else []
    )


def _has_nextn(folder: Path, blocks: int) -> bool:
    """Whether the checkpoint's files hold such layers: named so, or beyond the blocks that the config counts."""
    for name in _names(folder):
        block = _BLOCK.match(name)
        if _MTP.search(name) or (block and blocks and int(block[1]) >= blocks):
            return True
    return False


def _names(folder: Path) -> Iterator[str]:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            yield from json.loads(file.read(length))


def _older_names(folder: Path) -> Callable[[str], str]:
    """Names of a vision tower as published checkpoints have them: transformers 5 saves it without one of its levels."""
    older = any(".vision_model." in name for name in _names(folder))

    def known_as(name: str) -> str:
        return name if older else _TOWER.sub(r"\1vision_model.\2", name)

    return known_as


def _write_hollow(writer: Any, found: dict[str, Any]) -> None:
    """Make the writer leave a hole in place of the tensors' data, and note the header's size and keys."""

    def write_tensors_to_file(file: Any, *, progress: bool = False) -> None:
        file.write_ti_data_to_file()
        (out,) = file.fout
        tensors = file.tensors[0].values()
        # llama.cpp's own writer, which writes the levels, drops trailing dimensions of 1
        dropped = sum(_trailing_ones(info.shape) for info in tensors)
        found.update(header_bytes=out.tell() - 8 * dropped, keys=list(file.kv_data[0]))
        file.write_padding(out, out.tell())
        out.truncate(out.tell() + sum(file.ggml_pad(info.nbytes, file.data_alignment) for info in tensors))

    writer.write_tensors_to_file = write_tensors_to_file


def _trailing_ones(shape: Any) -> int:
    """Dimensions of 1 that end a shape in llama.cpp's order, which is the reverse of this one; one always stays."""
    count = 0
    for length in shape[:-1]:
        if length != 1:
            break
        count += 1
    return count
