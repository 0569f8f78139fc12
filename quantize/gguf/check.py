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
from quantize.gguf.reasons import QUIET, reason_of
from quantize.reporter import SILENT, Reporter
from quantize.source.resolved import Source

TEXT = (
    "The ship had been at sea for three weeks when the cook noticed that the last barrel of flour was damp. "
    "He told nobody, baked the bread a little longer, and wrote the number 17 on the lid."
)
LENGTH = 48
BEYOND = 64
"""Tokens compared after the first that no longer sees the start of the text in a sliding window."""
LONGEST = 4096 + 2 * BEYOND
"""Most tokens computed for the sake of a window: the widest window in wide use, and what is compared beyond it."""
MOST_WORK = 3e14
"""Most operations of the long comparison, 2 for each parameter and token; some minutes on a desktop's processor."""
MOST_SCORES = 2 * 2**30
"""Most bytes of attention scores, in architectures whose attention keeps them all."""


def check_conversion(
    conversion: Conversion, path: Path, tolerance: float, reporter: Reporter = SILENT
) -> dict[str, Any]:
    """Compare the conversion with its source, once; the result is cached beside the file.

    Args:
        tolerance: largest allowed mean KL divergence, in nats.

    Returns:
        ``kl_divergence``, ``top1_agreement``, ``largest_difference`` of a logit, ``same_tokens``; of models with a
        sliding window also ``sliding_window``, and, unless that would take too long, ``kl_beyond_window``; ``notes``
        on what users of the file have to know.

    Raises:
        GgufError: the divergence exceeds the tolerance, or llama.cpp cannot load the file.
    """
    source, place = conversion.source, path.with_suffix(".check-2.json")
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    else:
        reporter.say("comparing the conversion's logits with the source's")
        found = _compare(source, path, conversion.trust_remote_code)
        write_atomically(place, json.dumps(found).encode())
    _judge(found["kl_divergence"], tolerance, source, "")
    window, beyond = found.get("sliding_window"), found.get("kl_beyond_window")
    notes = []
    if window and beyond is None:
        notes.append(f"the conversion was not compared beyond the sliding window of {window} tokens, to save time")
    elif window and beyond is not None and not beyond <= tolerance:
        if any("sliding_window" in key or "chunk_size" in key for key in conversion.header().keys):
            _judge(beyond, tolerance, source, f" beyond the sliding window of {window} tokens")
        notes.append(f"llama.cpp knows no sliding window for this architecture: use at most {window} tokens of context")
    for note in notes:
        reporter.say(note)
    return {**found, **({"notes": notes} if notes else {})}


def _judge(divergence: float, tolerance: float, source: Source, where: str) -> None:
    if not divergence <= tolerance:  # NaN too
        raise GgufRunError(
            f"{source.named}: the converted file's logits differ from the source's{where} (mean KL divergence "
            f"{divergence:.3g}, allowed {tolerance:g}); known causes are rope or attention settings that "
            "the converter drops, and a tokenizer that llama.cpp reads differently; compare config.json with the log "
            "of llama.cpp, or raise gguf.logits_tolerance if you know why"
        )


def _compare(source: Source, path: Path, trust_remote_code: bool) -> dict[str, Any]:
    import torch

    from quantize.calibration.forward import Activations
    from quantize.calibration.tokens import encode, load_tokenizer
    from quantize.source.streamed import StreamedModel

    tokenizer = load_tokenizer(source, trust_remote_code)
    plain = encode(tokenizer, TEXT)
    window, length = _length(source)
    ids = np.array(_text_ids(encode(tokenizer, TEXT, special=True), plain, length), dtype=np.int64)
    picks = [*range(min(LENGTH, len(ids))), *range(max(LENGTH, len(ids) - BEYOND), len(ids))]
    logits, tokens = _run_llama(source, path, ids, picks)
    theirs = torch.from_numpy(logits)
    model = StreamedModel(source, torch.float32, torch.device("cpu"), trust_remote_code=trust_remote_code, head=True)
    state = Activations(model, ids[None], 1)
    for index in range(len(model)):
        with model.block(index) as block:
            state.advance(index, block)
    ours = model.logits(state.ids[:, picks], state.hidden[:, picks])[0].float()
    theirs = theirs[:, : ours.shape[1]]
    left, right = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergences = (left.exp() * (left - right)).sum(-1)
    near = sum(place < (window or len(ids)) for place in picks)
    return {
        "kl_divergence": float(f"{float(divergences[:near].mean()):.3g}"),
        "top1_agreement": float(f"{float((ours.argmax(-1) == theirs.argmax(-1))[:near].float().mean()):.4g}"),
        "largest_difference": float(f"{float((ours - theirs)[:near].abs().max()):.3g}"),
        "same_tokens": tokens == list(plain),
        **({"sliding_window": window} if window else {}),
        **({"kl_beyond_window": float(f"{float(divergences[near:].mean()):.3g}")} if near < len(picks) else {}),
    }


def _length(source: Source) -> tuple[int | None, int]:
    """The model's sliding window, and the number of tokens to compute: some beyond it, where that is bearable."""
    config = source.checkpoint.text_config
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    if not isinstance(window, int) or isinstance(window, bool) or config.get("use_sliding_window") is False:
        return None, LENGTH
    length = max(LENGTH, window + BEYOND)
    positions = source.checkpoint.size("max_position_embeddings", "n_positions") or length
    heads = config.get("num_attention_heads")
    scores = 12 * length**2 * (heads if isinstance(heads, int) else 1) if config.get("attn_logit_softcapping") else 0
    work = source.checkpoint.nbytes * length  # of 16-bit weights: two operations each
    bearable = length <= min(LONGEST, positions) and work <= MOST_WORK and scores <= MOST_SCORES
    return window, length if bearable else LENGTH


def _text_ids(start: list[int], plain: list[int], length: int) -> list[int]:
    """``length`` token ids: the text, and again with its tokens in other orders, so that nothing repeats."""
    found, order = list(start), np.random.Generator(np.random.PCG64(0))
    while len(found) < length and plain:
        found += order.permutation(plain).tolist()
    return found[:length]


def _run_llama(
    source: Source, path: Path, ids: NDArray[np.int64], picks: list[int]
) -> tuple[NDArray[np.float32], list[int]]:
    """llama.cpp's logits at these places of ``ids``, and its own token ids of the text."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(asked, ids)
        arguments = {
            "model": str(path.resolve()), "ids": str(asked), "logits": str(answered), "threads": thread_count(),
            "text": TEXT, "picks": picks,
        }  # fmt: skip
        try:
            tokens = run_child(Task(Path(__file__).with_name("worker_logits.py"), arguments, variables=QUIET))
        except ChildFailed as error:
            reason = reason_of(error)
            raise GgufRunError(f"{source.named}: llama.cpp cannot load the converted file: {reason}") from None
        return np.load(answered), tokens
