"""The content of a checkpoint, read from its config and headers only: no torch, no weights.

Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, the data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantize.errors import SourceError, shortened, shortly
from quantize.files.inside import sound_files, stray
from quantize.formats.names import is_file_name
from quantize.formats.safetensors_header import file_header
from quantize.formats.tensors import DTYPE_BYTES, INDEX_NAME, SINGLE_NAME, TensorSpec
from quantize.source.float8 import Float8, find_float8
from quantize.source.slices import Slice

MOST_JSON = 100_000_000
"""Largest accepted config or index, in bytes; the largest real ones take 10 MB."""
MOST_CARRIED = 5_000_000_000
"""Largest accepted file other than weights, in bytes; the largest real ones, of tokenizers, take 40 MB."""
MOST_SIZES = {
    "hidden_size": 2**24, "n_embd": 2**24, "vocab_size": 2**31, "num_hidden_layers": 10_000, "n_layer": 10_000,
    "num_experts_per_tok": 100_000, "max_position_embeddings": 2**40, "n_positions": 2**40,
}  # fmt: skip
"""Config values used in computations here, each with an upper limit above any real one."""
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".npz",
    ".tflite", ".mlmodel", ".ot",
)  # fmt: skip
READABLE = frozenset({"mxfp4", "fp8"})
"""The quantized forms that are read as 16-bit weights: gpt-oss and DeepSeek are published in no other."""
NOT_COPIED = frozenset(
    {"README.md", "config.json", "quantize_config.json", "quant_config.json", INDEX_NAME, "quantize-manifest.json"}
)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint's config and tensor table.

    Attributes:
        config: ``config.json`` as data.
        tensors: every tensor by its name in the files; in place of stacked ones their ``slices``.
        folder: the files' folder, or None if only headers were fetched from the hub.
        slices: linears inside stacked tensors, by their own names. stored: all tensors as they lie in the files, where
            there are slices. float8: tensors that are stored as float8, and seen as bfloat16. headers: what the files'
            headers say, where there are such.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    folder: Path | None = None
    shards: tuple[str, ...] = field(default=())
    slices: Mapping[str, Slice] = field(default_factory=dict)
    stored: Mapping[str, TensorSpec] = field(default_factory=dict)
    float8: Mapping[str, Float8] = field(default_factory=dict)
    headers: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the decoder (nested in some architectures)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def size(self, *names: str) -> int | None:
        """The first of these config values that is set. Names must be in ``MOST_SIZES``, whose limits were checked."""
        found = (self.text_config.get(name) for name in names)
        return next((int(value) for value in found if value is not None), None)

    @property
    def in_files(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name in the files."""
        return self.stored or self.tensors

    @property
    def in_headers(self) -> Mapping[str, TensorSpec]:
        """Every tensor as the files' headers describe it."""
        return self.headers or self.in_files

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())


def with_slices(checkpoint: Checkpoint, slices: Mapping[str, Slice]) -> Checkpoint:
    """The same checkpoint with slices in place of the tensors that they are taken from."""
    if checkpoint.slices or not slices:
        return checkpoint
    parts: dict[str, list[str]] = {}
    for name, one in slices.items():
        parts.setdefault(one.stored, []).append(name)
    hidden = {one.scales for one in slices.values()}
    tensors = {}
    for name, spec in checkpoint.tensors.items():
        for part in parts.get(name, ()):
            tensors[part] = slices[part].spec(spec)
        if name not in parts and name not in hidden:
            tensors[name] = spec
    return replace(checkpoint, tensors=tensors, slices=slices, stored=checkpoint.tensors)


def with_float8(checkpoint: Checkpoint, where: str) -> Checkpoint:
    """The same checkpoint, with float8 tensors as bfloat16 and without their factors.

    Raises:
        SourceError: the factors are stored in a form that is not read, or the linears are packed integers.
    """
    tensors = checkpoint.tensors
    packed = next((name for name in tensors if name.endswith(".qweight")), None)
    if packed is not None:
        raise SourceError(
            f"{where}: the model is already quantized (it has {packed}); name the unquantized model instead"
        )
    found, beside = find_float8(tensors, checkpoint.config, where)
    if not found:
        return checkpoint
    seen = {
        name: replace(spec, dtype="BF16") if name in found else spec
        for name, spec in tensors.items()
        if name not in beside
    }
    return replace(checkpoint, tensors=seen, float8=found, headers=tensors)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config and headers of a local checkpoint and check that it is complete.

    Raises:
        SourceError: there is no config or no safetensors weights, a shard is missing or truncated, the model is
            already quantized, the index disagrees with the shards, or a link leads out of the folder.
    """
    non_weight_files(folder)
    config = read_config(folder)
    names = _shard_names(folder)
    tensors: dict[str, TensorSpec] = {}
    for name in names:
        for key, spec in read_header(folder / name).items():
            if key in tensors:
                raise SourceError(f"{folder}: tensor {key} is in both {tensors[key].file} and {name}")
            tensors[key] = spec
    if not tensors:
        raise SourceError(f"{folder}: its safetensors files contain no tensors")
    _check_index(folder, tensors)
    return with_float8(Checkpoint(config, tensors, folder, tuple(names)), str(folder))


def check_files(folder: Path) -> dict[str, Path]:
    """Every file in a model's folder except hidden ones, by relative name, checked to be a regular file of the folder.

    Tokenizers, converters and engines get the whole folder, so files that are not read here are checked too.

    Raises:
        SourceError: a link that leads out of the folder (or, for a snapshot in the hub's cache, out of its repo), a
            pipe, a socket or a device.
    """
    found, strays = sound_files(folder, lambda name: not name.rsplit("/", 1)[-1].startswith("."))
    for name, reason in strays.items():
        raise SourceError(
            f"{folder / name}: {reason}; a source is read, and published, from its own folder only: "
            "put the file itself there, or remove it"
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a folder.

    Raises:
        SourceError: it is missing, damaged, or of a quantized model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder}: has no config.json, so it is not a Hugging Face model directory")
    if (reason := stray(path, folder)) is not None:
        raise SourceError(f"{path}: {reason}; put the file itself there")
    try:
        config = _read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not readable JSON: {error}") from None
    return check_config(config, str(path))


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON:,} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def check_config(config: Any, where: str) -> dict[str, Any]:
    """Return the config if it describes a model that can be quantized.

    Raises:
        SourceError: it does not.
    """
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(f"{where}: names no model_type, so the architecture is unknown")
    nested = config.get("text_config")
    if nested is not None and not isinstance(nested, dict):
        raise SourceError(f"{where}: text_config: must be a mapping of keys to values, not {shortly(nested)}")
    for one in (config, nested or {}):
        _check_unquantized(one, where)
    _check_sizes(config, where)
    _check_sizes(nested or {}, f"{where}: text_config")
    return config


def _check_unquantized(config: Mapping[str, Any], where: str) -> None:
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else ""
    if not method and isinstance(settings, dict) and any(str(key).startswith("load_in_") for key in settings):
        method = "bitsandbytes"  # its first configs do not name it
    if not isinstance(method, str) or method not in READABLE:
        method = shortened(method or "", 80) if isinstance(method, str | None) else shortly(method)
        raise SourceError(
            f"{where}: the model is already quantized ({method or 'unknown method'}); "
            "name the unquantized model instead"
        )


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    for name, most in MOST_SIZES.items():
        value = config.get(name)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if value is not None and (isinstance(value, bool) or not whole or not 1 <= value <= most):
            raise SourceError(f"{where}: {name}: must be an integer from 1 to {most:,}, not {shortly(value)}")


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Tensor table of a safetensors file; the file's length is checked against its header.

    Raises:
        SourceError: the file is missing, truncated, or not a safetensors file.
    """
    if not os.path.isfile(path):  # opening a pipe would block forever
        raise SourceError(f"{path}: shard is missing; download the model again")
    try:
        header, size = file_header(path), path.stat().st_size
        if header.nbytes != size:
            raise ValueError(f"it has {size:,} bytes, but its header claims {header.nbytes:,}")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: is truncated or damaged ({_reason(error)}); download the model again") from None
    check_dtypes(header.tensors, str(path))
    return dict(header.tensors)


def check_dtypes(table: Mapping[str, TensorSpec], where: str) -> None:
    """Raise :class:`SourceError` if a tensor has a dtype that a release cannot contain."""
    unknown = next((key for key, spec in table.items() if spec.dtype not in DTYPE_BYTES), None)
    if unknown:
        raise SourceError(
            f"{where}: tensor {unknown} has dtype {shortly(table[unknown].dtype)}, which is not supported"
        )


def non_weight_files(folder: Path) -> list[str]:
    """Relative names of the files to copy unchanged: all except weights, hidden files and files that releases write.

    Raises:
        SourceError: a name is not valid in a repo, a file is too large, or see :func:`check_files`.
    """
    names = []
    for name, path in check_files(folder).items():
        if is_carried_over(name):
            if not is_file_name(name):
                raise SourceError(f"{path}: its name is not valid in a release; rename or remove the file")
            if path.stat().st_size > MOST_CARRIED:
                raise SourceError(
                    f"{path}: has {path.stat().st_size / 1e9:.0f} GB and would be copied into every branch; remove it"
                )
            names.append(name)
    return names


def is_carried_over(name: str) -> bool:
    """Whether a source file with this relative name is copied into a release unchanged."""
    base = name.rsplit("/", 1)[-1]
    weight = base.lower().endswith((*WEIGHT_SUFFIXES, ".index.json"))
    return not weight and name not in NOT_COPIED


def _shard_names(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if index.is_file():
        return sorted(set(read_index(index).values()))
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if names:
        return names
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise SourceError(
            f"{folder}: has its weights only as pickle ({pickles[0]}), which can run code when it is read; "
            "convert it to safetensors first (transformers: model.save_pretrained)"
        )
    raise SourceError(f"{folder}: contains no .safetensors weights")


def read_index(index: Path) -> dict[str, str]:
    """Read an index: tensor name -> shard name.

    Raises:
        SourceError: it is not an index, or names a shard outside its folder.
    """
    try:
        table = _read_json(index)["weight_map"]
        names = {str(key): str(value) for key, value in table.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index}: is not a safetensors index ({_reason(error)})") from None
    outside = next(
        (name for name in names.values() if "/" in name or name.startswith(".") or not is_file_name(name)), None
    )
    if outside:
        raise SourceError(f"{index}: names the shard '{outside}', which is outside the model's folder")
    return names


def _check_index(folder: Path, tensors: Mapping[str, TensorSpec]) -> None:
    index = folder / INDEX_NAME
    if not index.is_file():
        return
    for key, shard in read_index(index).items():
        if key not in tensors or tensors[key].file != shard:
            raise SourceError(f"{index}: says that {shortened(key, 200)} is in {shard}, but it is not")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
