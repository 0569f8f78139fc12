"""An architecture built by transformers without weights, and the names of its parameters in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from quantize.errors import QuantizeError, SourceError, is_memory_shortage
from quantize.source.checkpoint import Checkpoint
from quantize.source.resolved import Source
from quantize.source.unchanged import guarded

CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Where a model that generates text is looked for; of equally complete ones the first is taken."""
MOST_QUOTED = 300
"""Characters of another library's message that are quoted."""


def empty_model(source: Source, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The architecture of a source, its parameters on the meta device.

    Raises:
        SourceError: transformers does not support it. SourceChanged: its files changed after they were hashed.
    """
    with guarded(source):
        return build_empty(source.folder, source.named, source.checkpoint, dtype, trust_remote_code)


def build_empty(folder: Path, named: str, checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The architecture of ``config.json`` in a folder, its parameters on the meta device.

    transformers may have several classes for a config (a causal language model, and one that also sees images); the one
    that finds most of its parameters in the checkpoint is taken.

    Raises:
        SourceError: transformers does not support it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a bad config can raise anything in model code
        raise _unsupported(named, checkpoint, error) from None
    found: tuple[int, Any] | None = None
    reason: Exception | None = None
    for auto in CLASSES:
        if not _knows(auto, config):
            continue
        try:
            model = _from_config(auto, config, dtype, trust_remote_code)
        except Exception as error:
            reason = reason or _unsupported(named, checkpoint, error)
            continue
        missing = len(missing_parameters(model, match_names(model, checkpoint.in_files)))
        if found is None or missing < found[0]:
            found = (missing, model)
        if not missing:
            break
    if found is None:
        raise reason or SourceError(
            f"{named}: transformers has no class that generates text for '{checkpoint.model_type}'; "
            "a newer transformers may have one"
        )
    return found[1].eval()


def _knows(auto: Any, config: Any) -> bool:
    """Whether an auto class has a model for a config, in transformers or in the model's repo."""
    return type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {})


def _from_config(auto: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights

    # sdpa omits Gemma 2's soft-capping of attention scores; eager computes what the model was trained with
    text = config.get_text_config()
    capped = any(getattr(one, "attn_logit_softcapping", None) is not None for one in (config, text))
    with init_empty_weights(include_buffers=False):
        return auto.from_config(
            config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **({"attn_implementation": "eager"} if capped else {}),
        )


@contextmanager
def running(source: Source) -> Iterator[None]:
    """Context for the first run of an architecture's code: its errors are reported as errors of the source.

    Raises:
        SourceError: the code failed; the message quotes its error.
    """
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        if is_memory_shortage(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{source.named}: the model cannot be run ({type(error).__name__}: {reason}); check that its config.json "
            "matches its weights and the transformers version"
        ) from None


def _unsupported(named: str, checkpoint: Checkpoint, error: Exception) -> Exception:
    if is_memory_shortage(error):
        return error
    reason = " ".join(str(error).split())[:MOST_QUOTED]
    return SourceError(f"{named}: transformers cannot build the architecture '{checkpoint.model_type}': {reason}")


def match_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Map parameter and buffer names to checkpoint tensor names, with transformers' own table of renamed tensors.

    All of its renamings are applied. A tensor that has to be split or merged on loading stays unmatched, and its
    parameter is then among :func:`missing_parameters`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    state = model.state_dict()
    names: dict[str, str] = {}
    for tensor in sorted(stored):  # some renamings need the first of their group first
        name, _ = rename_source_key(tensor, renamings, [], getattr(model, "base_model_prefix", None), state)
        if name not in state and tensor in state:  # a renaming meant for another layout of the checkpoint
            name = tensor
        if name in state and (name not in names or tensor == name):
            names[name] = tensor
    return names


def missing_parameters(model: Any, names: Mapping[str, str]) -> list[str]:
    """Names of parameters that neither have a tensor in the checkpoint nor share one that has."""
    tied = tied_parameters(model)
    return [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in names and tied.get(name) not in names
    ]


def tied_parameters(model: Any) -> dict[str, str]:
    """Parameters that the config ties to others: name -> the name of the parameter whose values it takes."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
