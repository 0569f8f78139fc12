"""Check the full-width GGUF file: compare logits of llama.cpp and transformers on a fixed text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.errors import GgufRunError
from quantize.files.atomic import write_atomically
from quantize.files.child import ChildFailed, Task, run_child
from quantize.files.threads import thread_count
from quantize.gguf.convert import Conversion
from quantize.reporter import SILENT, Reporter
from quantize.source.resolved import Source

TEXT = (
    "The ship had been at sea for three weeks when the cook noticed that the last barrel of flour was damp. "
    "He told nobody, baked the bread a little longer, and wrote the number 17 on the lid."
)
LENGTH = 48


def check_conversion(
    conversion: Conversion, path: Path, tolerance: float, reporter: Reporter = SILENT
) -> dict[str, Any]:
    """Compare the conversion with its source, once; the result is cached beside the file.

    Args:
        tolerance: largest allowed mean KL divergence, in nats.

    Returns:
        ``kl_divergence``, ``top1_agreement``, ``largest_difference`` of a logit, ``same_tokens``.

    Raises:
        GgufError: the divergence exceeds the tolerance, or llama.cpp cannot load the file.
    """
    source, place = conversion.source, path.with_suffix(".check.json")
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    else:
        reporter.say("comparing the conversion's logits with the source's")
        found = _compare(source, path, conversion.trust_remote_code)
        write_atomically(place, json.dumps(found).encode())
    if not found["kl_divergence"] <= tolerance:  # NaN too
        raise GgufRunError(
            f"{source.named}: the converted file's logits differ from the source's (mean KL divergence "
            f"{found['kl_divergence']:.3g}, allowed {tolerance:g}); known causes are rope or attention settings that "
            "the converter drops, and a tokenizer that llama.cpp reads differently; compare config.json with the log "
            "of llama.cpp, or raise gguf.logits_tolerance if you know why"
        )
    return found


def _compare(source: Source, path: Path, trust_remote_code: bool) -> dict[str, Any]:
    import torch

    from quantize.calibration.forward import Activations
    from quantize.calibration.tokens import encode, load_tokenizer
    from quantize.source.streamed import StreamedModel

    tokenizer = load_tokenizer(source, trust_remote_code)
    plain = encode(tokenizer, TEXT)
    ids = np.array(encode(tokenizer, TEXT, special=True)[:LENGTH], dtype=np.int64)
    logits, tokens = _run_llama(source, path, ids)
    theirs = torch.from_numpy(logits)
    model = StreamedModel(source, torch.float32, torch.device("cpu"), trust_remote_code=trust_remote_code, head=True)
    state = Activations(model, ids[None], 1)
    for index in range(len(model)):
        with model.block(index) as block:
            state.advance(index, block)
    ours = model.logits(state.ids, state.hidden)[0].float()
    theirs = theirs[:, : ours.shape[1]]
    left, right = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (left.exp() * (left - right)).sum(-1).mean()
    return {
        "kl_divergence": float(f"{float(divergence):.3g}"),
        "top1_agreement": float(f"{float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()):.4g}"),
        "largest_difference": float(f"{float((ours - theirs).abs().max()):.3g}"),
        "same_tokens": tokens == list(plain),
    }


def _run_llama(source: Source, path: Path, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], list[int]]:
    """llama.cpp's logits for ``ids``, and its own token ids of the text."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(asked, ids)
        arguments = {
            "model": str(path.resolve()), "ids": str(asked), "logits": str(answered), "threads": thread_count(),
            "text": TEXT,
        }  # fmt: skip
        try:
            tokens = run_child(Task(Path(__file__).with_name("worker_logits.py"), arguments))
        except ChildFailed as error:
            raise GgufRunError(f"{source.named}: llama.cpp cannot load the converted file: {error.reason}") from None
        return np.load(answered), tokens
