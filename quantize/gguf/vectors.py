"""From statistics of the checkpoint's linears to the vectors of an importance matrix, one for each GGUF weight.

llama.cpp expects, for a weight of M stacked matrices with K inputs each, M vectors of K values: the sums of squares of
each matrix' own inputs. Which linears a GGUF weight was made of is known from the conversion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Diagonals = Mapping[str, tuple[NDArray[np.float32], int]]
Vector = tuple[NDArray[np.float32], NDArray[np.int64]]

OUTPUTS = ":outputs"
"""Ends the name, in :data:`Diagonals`, of the sums of squares of a linear's outputs; those of its inputs have none."""
ABSORBED = "attn_k_b.weight"
"""llama.cpp's name of the key half of MLA's ``kv_b_proj``, transposed per head: its inputs are the queries."""
QUERIES = ("q_b_proj", "q_proj")
"""Names of the linear beside ``kv_b_proj`` that computes the queries, ``[heads, nope + rope]``."""


@dataclass(frozen=True)
class Vectors:
    """Sums of squares float32 [M, K], and counts of tokens int64 [M], by GGUF weight.

    Attributes:
        left_out: weights made of known linears whose inputs llama.cpp's arrangement does not give, sorted.
    """

    found: Mapping[str, Vector]
    left_out: tuple[str, ...]


def queries_of(made_of: Mapping[str, Iterable[str]], linears: Iterable[str]) -> frozenset[str]:
    """The linears whose outputs are the inputs of a GGUF weight, so that sums of their squares are needed."""
    known, found = set(linears), set[str]()
    for target, sources in made_of.items():
        if target.endswith(ABSORBED):
            found.update(query for name in sources if (query := _query_beside(name, known)))
    return frozenset(found)


def find_vectors(
    diagonals: Diagonals, made_of: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> Vectors:
    """The vectors of all GGUF weights made of linears with statistics.

    Args:
        diagonals: sums of squares, and the number of tokens, by linear.
        made_of: the checkpoint's tensors that each GGUF tensor was made of, in order.
        shapes: of the GGUF tensors, in the row-major order of torch.
    """
    found: dict[str, Vector] = {}
    left_out = []
    for target, sources in made_of.items():
        linears = [name.removesuffix(".weight") for name in sources if name.endswith(".weight")]
        if not target.endswith(".weight") or not linears or any(name not in diagonals for name in linears):
            continue
        shape = shapes[target]
        if len(shape) < 2:
            continue
        vector = (
            _absorbed(diagonals, linears[0], shape)
            if target.endswith(ABSORBED)
            else _inputs([diagonals[name] for name in linears], shape)
        )
        if vector is None:
            left_out.append(target)
        else:
            found[target] = vector
    return Vectors(found, tuple(sorted(left_out)))


def inputs_of(
    target: str, sources: Iterable[str], shape: tuple[int, ...], widths: Mapping[str, int]
) -> tuple[tuple[str, ...], ...] | None:
    """The linears whose input each matrix of a GGUF weight multiplies; several that share one if it is made of several.

    Args:
        target: the GGUF weight. sources: the checkpoint's tensors that it was made of, in order. shape: the weight's,
            in the row-major order of torch. widths: number of inputs of each linear with statistics.

    Returns:
        The names for each of the M matrices; None where this is not known.
    """
    linears = [name.removesuffix(".weight") for name in sources if name.endswith(".weight")]
    known = linears and all(widths.get(name) == shape[-1] for name in linears)
    if not known or len(shape) < 2 or not target.endswith(".weight") or target.endswith(ABSORBED):
        return None
    matrices = int(np.prod(shape[:-2]))
    if len(linears) == 1:
        return ((linears[0],),) * matrices
    if matrices == 1:
        return (tuple(linears),)
    return tuple((name,) for name in linears) if len(linears) == matrices else None


def _inputs(own: list[tuple[NDArray[np.float32], int]], shape: tuple[int, ...]) -> Vector | None:
    matrices, inputs = int(np.prod(shape[:-2])), shape[-1]
    if any(len(sums) != inputs for sums, _ in own):
        return None
    if len(own) == 1:  # a linear of its own, or one cut into several matrices with the same input
        own = own * matrices
    elif matrices == 1 and all(np.array_equal(sums, own[0][0]) for sums, _ in own):  # several above one another
        own = own[:1]
    if len(own) != matrices:
        return None
    return np.stack([sums for sums, _ in own]), np.array([count for _, count in own], dtype=np.int64)


def _absorbed(diagonals: Diagonals, linear: str, shape: tuple[int, ...]) -> Vector | None:
    """Of [heads, latent, nope]: the squares of each head's queries, without their rotated part."""
    query = _query_beside(
        f"{linear}.weight", {name.removesuffix(OUTPUTS) for name in diagonals if name.endswith(OUTPUTS)}
    )
    if query is None or len(shape) != 3:
        return None
    sums, count = diagonals[query + OUTPUTS]
    heads, _, inputs = shape
    if len(sums) % heads or len(sums) // heads < inputs:
        return None
    own = sums.reshape(heads, -1)[:, :inputs]
    return np.ascontiguousarray(own), np.full(heads, count, dtype=np.int64)


def _query_beside(name: str, known: Iterable[str]) -> str | None:
    beside = name.removesuffix(".weight").rpartition(".")[0]
    return next((query for leaf in QUERIES if (query := f"{beside}.{leaf}") in known), None)
