"""Codes packed into 32-bit words, low bits first: the layout of AutoGPTQ's ``qweight`` and ``qzeros``.

32 codes of b bits fill b words as one little-endian bit stream. For 2, 4 and 8 bits that is the plain
packing; for 3 bits it is the 10-1-10-1-10 layout, in which codes 10 and 21 straddle two words.
"""

from __future__ import annotations

import torch

WORD = 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first dimension.

    Args:
        codes: [n, m] integers in 0 .. 2^bits - 1, with ``n * bits`` divisible by 32.

    Returns:
        int32 [n * bits / 32, m].

    Raises:
        ValueError: ``n * bits`` does not fill whole words.
    """
    count, columns = codes.shape
    if count * bits % WORD:
        raise ValueError(f"{count} codes of {bits} bits do not fill 32-bit words")
    runs = -(-count // WORD)
    source = codes.to(torch.uint8).contiguous()  # bytes transpose four times faster than words
    if count % WORD:
        source = torch.cat([source, source.new_zeros(runs * WORD - count, columns)])
    source = source.view(runs, WORD, columns)
    words = torch.zeros(runs, bits, columns, dtype=torch.int32, device=codes.device)
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        code = source[:, position].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > WORD:
            words[:, word + 1] |= code >> (WORD - shift)
    return words.view(runs * bits, columns)[: count * bits // WORD].contiguous()


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int32 [n * bits / 32, m] -> uint8 [n, m]."""
    rows, columns = words.shape
    count = rows * WORD // bits
    runs = -(-rows // bits)
    if rows % bits:
        words = torch.cat([words, words.new_zeros(runs * bits - rows, columns)])
    source = words.view(runs, bits, columns)
    codes = torch.empty(runs, WORD, columns, dtype=torch.int32, device=words.device)
    mask = 2**bits - 1
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        code = source[:, word] >> shift  # arithmetic shift: the mask removes the copied sign bits
        if shift + bits > WORD:
            code = (code & (2 ** (WORD - shift) - 1)) | (source[:, word + 1] << (WORD - shift))
        codes[:, position] = code & mask
    return codes.view(runs * WORD, columns)[:count].to(torch.uint8)
