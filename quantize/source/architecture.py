"""An architecture built by transformers without weights, and the names of its parameters in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.errors import QuantizeError, SourceError, is_memory_shortage
from quantize.source.resolved import Source
from quantize.source.unchanged import guarded


def empty_model(source: Source, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The architecture of a source, its parameters on the meta device.

    Raises:
        SourceError: transformers does not support it. SourceChanged: its files changed after they were hashed.
    """
    with guarded(source):
        return _empty_model(source, dtype, trust_remote_code)


def _empty_model(source: Source, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a bad config can raise anything in model code
        if is_memory_shortage(error):
            raise
        raise SourceError(_unsupported(source, error)) from None
    # sdpa omits Gemma 2's soft-capping of attention scores; eager computes what the model was trained with
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                **({"attn_implementation": "eager"} if capped else {}),
            )
    except Exception as error:
        if is_memory_shortage(error):
            raise
        raise SourceError(_unsupported(source, error)) from None
    return model.eval()


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


def _unsupported(source: Source, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    kind = source.checkpoint.model_type
    return f"{source.named}: transformers has no causal language model '{kind}': {reason}"


def match_names(model: Any, source: Source) -> dict[str, str]:
    """Map parameter names to checkpoint tensor names, with transformers' own table of renamed tensors.

    Only plain renames are applied; a tensor that has to be split or merged on loading stays unmatched, and loading
    then reports it as missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [item for item in get_model_conversion_mapping(model) if type(item) is WeightRenaming]
    state = model.state_dict()
    names = {}
    for stored in source.checkpoint.tensors:
        name, _ = rename_source_key(stored, renamings, [], getattr(model, "base_model_prefix", None), state)
        if name in state:
            names[name] = stored
    return names
