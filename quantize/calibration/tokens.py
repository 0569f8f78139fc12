"""From texts to token windows: seeded, so that a recipe always gets the same tokens."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.calibration.corpus import check_unchanged, identity, read_pieces, title
from quantize.errors import CalibrationError, SourceChanged, is_memory_shortage, is_panic
from quantize.recipe.schema import Calibration, Corpus
from quantize.source.resolved import Source
from quantize.source.unchanged import guarded

SAMPLER_VERSION = 2  # raise it when a recipe's windows change
SURPLUS = 4  # read this many times the tokens needed, so that random windows rarely overlap


@dataclass(frozen=True)
class Tokens:
    """Calibration windows.

    Attributes:
        ids: int64 [samples, sequence_length].
        sha256: of the ids as little-endian int64, row by row.
        bos: whether every window starts with the tokenizer's BOS, as real prompts do.
    """

    ids: NDArray[np.int64]
    sha256: str
    bos: bool


def calibration_identity(calibration: Calibration) -> dict[str, Any]:
    """What determines the tokens, except the tokenizer (which is part of the source)."""
    return {
        "corpora": [identity(corpus) for corpus in calibration.dataset],
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "sampler": SAMPLER_VERSION,
    }


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """Load the source's tokenizer.

    Raises:
        CalibrationError: it is missing or cannot be read. SourceChanged: its files changed after they were hashed.
    """
    from transformers import AutoTokenizer

    try:
        with guarded(source):
            return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except SourceChanged:
        raise
    except BaseException as error:  # tokenizers can raise anything, including panics of their Rust code
        if not _is_of_the_tokenizer(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{source.named}: its tokenizer cannot be read: {reason}") from None


def sample_tokens(calibration: Calibration, tokenizer: Any) -> Tokens:
    """Cut ``samples`` random windows out of the calibration texts, equally many from each.

    Raises:
        CalibrationError: a text is shorter than one window, or changed since planning.
    """
    count, length = calibration.samples, calibration.sequence_length
    generator = np.random.Generator(np.random.PCG64(calibration.seed))
    bos = _bos(tokenizer)
    corpora = calibration.dataset
    rows = []
    for index, corpus in enumerate(corpora):
        share = count // len(corpora) + (index < count % len(corpora))
        if share:
            rows.append(_windows(corpus, tokenizer, share, length, bos=bos, generator=generator))
    for corpus in corpora:
        check_unchanged(corpus)
    ids = np.concatenate(rows)
    digest = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()
    return Tokens(ids, digest, bos is not None)


def _windows(
    corpus: Corpus, tokenizer: Any, count: int, length: int, *, bos: int | None, generator: np.random.Generator
) -> NDArray[np.int64]:
    ids = _ids(corpus, tokenizer, SURPLUS * count * length)
    body = length - (bos is not None)
    if len(ids) < body:
        raise CalibrationError(
            f"calibration.dataset: {title(corpus)} gives {len(ids)} tokens, fewer than one window of {length}; "
            "use a longer text or a smaller sequence_length"
        )
    starts = generator.integers(0, len(ids) - body + 1, size=count)
    windows = ids[starts[:, None] + np.arange(body)]
    return windows if bos is None else np.concatenate([np.full((count, 1), bos), windows], axis=1)


def _ids(corpus: Corpus, tokenizer: Any, most: int) -> NDArray[np.int64]:
    """Token ids of a text, int64; reading stops once there are ``most``."""
    found: list[NDArray[np.int64]] = []
    count = 0
    for piece in read_pieces(corpus):
        found.append(np.asarray(encode(tokenizer, piece), dtype=np.int64))
        count += len(found[-1])
        if count >= most:
            break
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, without the length warning; ``special`` adds the tokens that open and close a prompt.

    Raises:
        CalibrationError: the tokenizer fails, or its output is not token ids.
    """
    try:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        found = [operator.index(token) for token in ids]
    except BaseException as error:  # it can raise anything, including panics of its Rust code
        if not _is_of_the_tokenizer(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CalibrationError(
            f"the source's tokenizer cannot encode a text ({reason}); see its tokenizer files"
        ) from None
    if found and not 0 <= min(found) <= max(found) < 2**31:
        raise CalibrationError(
            f"the source's tokenizer gives token ids from {min(found)} to {max(found)}, which no embedding has"
        )
    return found


def _is_of_the_tokenizer(error: BaseException) -> bool:
    """Whether an error comes from the tokenizer: any but memory shortage; a Rust panic is not an ``Exception``."""
    return (isinstance(error, Exception) or is_panic(error)) and not is_memory_shortage(error)


def _bos(tokenizer: Any) -> int | None:
    """The BOS id, if the tokenizer starts a prompt with one."""
    start = encode(tokenizer, "a", special=True)[:1]
    bos = tokenizer.bos_token_id
    return start[0] if start and start == [bos] else None
