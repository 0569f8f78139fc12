"""From texts to token windows: seeded, so that the same recipe always sees the same tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize.calibration.corpus import identity, read_text, title
from quantize.errors import CalibrationError
from quantize.recipe.schema import Calibration, Corpus
from quantize.source.resolved import Source

SAMPLER_VERSION = 1  # raise when the same recipe would give other windows


@dataclass(frozen=True)
class Tokens:
    """Calibration windows.

    Attributes:
        ids: int64 [samples, sequence_length].
        sha256: of the ids as little-endian int64, row by row.
        bos: whether every window starts with the tokenizer's BOS, as real prompts do.
    """

    ids: np.ndarray
    sha256: str
    bos: bool


def calibration_identity(calibration: Calibration) -> dict[str, Any]:
    """What determines the tokens beside the tokenizer (which is part of the source)."""
    return {
        "corpora": [identity(corpus) for corpus in calibration.dataset],
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "sampler": SAMPLER_VERSION,
    }


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The source's tokenizer.

    Raises:
        CalibrationError: the source has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer readers raise anything, also from their Rust side
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(f"{source.named}: its tokenizer cannot be read: {reason}") from None


def sample_tokens(calibration: Calibration, tokenizer: Any) -> Tokens:
    """Cut ``samples`` random windows out of the calibration texts, in equal parts from each.

    Raises:
        CalibrationError: a text that is shorter than one window.
    """
    count, length = calibration.samples, calibration.sequence_length
    generator = np.random.Generator(np.random.PCG64(calibration.seed))
    bos = _bos(tokenizer)
    corpora = calibration.dataset
    rows = []
    for index, corpus in enumerate(corpora):
        share = count // len(corpora) + (index < count % len(corpora))
        if share:
            rows.append(_windows(corpus, tokenizer, share, length, bos, generator))
    ids = np.concatenate(rows)
    digest = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()
    return Tokens(ids, digest, bos is not None)


def _windows(
    corpus: Corpus, tokenizer: Any, count: int, length: int, bos: int | None, generator: np.random.Generator
) -> np.ndarray:
    text = read_text(corpus, count * length)
    ids = np.asarray(encode(tokenizer, text), dtype=np.int64)
    body = length - (bos is not None)
    if len(ids) < body:
        raise CalibrationError(
            f"calibration.dataset: {title(corpus)} gives {len(ids)} tokens, fewer than one window of {length}; "
            "use a longer text or a smaller sequence_length"
        )
    starts = generator.integers(0, len(ids) - body + 1, size=count)
    windows = ids[starts[:, None] + np.arange(body)]
    return windows if bos is None else np.concatenate([np.full((count, 1), bos), windows], axis=1)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens and without the length warning."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _bos(tokenizer: Any) -> int | None:
    """The BOS id, if the tokenizer puts one before a prompt."""
    start = tokenizer("a")["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and start == [bos] else None
