"""The compiled CPU kernel of :mod:`quantize.methods.descent`.

Functions are at module level, so that numba's disk cache serves later processes.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from quantize.methods.kernel import LANES, Floats, _half


@numba.njit(inline="always", cache=True)
def _signed_half(value: float) -> float:
    return -_half(-value) if value < 0 else _half(value)


@numba.njit(cache=True)
def _apply(pressure: Floats, moved: Floats, curvature: Floats, column: int, change: Floats) -> None:
    """Change the weights of one column of LANES rows by ``change``."""
    for later in range(len(pressure)):
        factor = curvature[column, later]
        for lane in range(LANES):
            pressure[later, lane] -= change[lane] * factor
    for lane in range(LANES):
        moved[column, lane] += change[lane]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def descend(
    pressures: Floats, curvature: Floats, codes: NDArray[np.uint8], scales: Floats, zeros: Floats, levels: Floats,
    top: float, size: int, refit: bool, fit_zero: bool, changes: Floats, gains: NDArray[np.float64],
) -> None:  # fmt: skip
    """Improve scales, zeros and codes of the B columns of a block; see :func:`quantize.methods.descent._block`.

    ``pressures`` [N, B] is (R H) at the block's columns, ``curvature`` [B, B] is H there; ``scales`` and ``zeros`` are
    [B / size, N]. ``changes`` [N, B] receives what the quantized weights change by, ``gains`` [N] has the error's fall
    added to it.
    """
    rows, columns = codes.shape
    floor = top - top
    limits = (levels[1:] + levels[:-1]) / levels.dtype.type(2)
    for tile in numba.prange((rows + LANES - 1) // LANES):
        row = tile * LANES
        count = min(LANES, rows - row)
        pressure = np.zeros((columns, LANES), pressures.dtype)
        held = np.zeros((columns, LANES), pressures.dtype)  # what the codes stand for, before scale and zero
        moved = np.zeros((columns, LANES), pressures.dtype)
        for lane in range(count):
            for column in range(columns):
                pressure[column, lane] = pressures[row + lane, column]
                code = codes[row + lane, column]
                held[column, lane] = levels[code] if len(levels) else code
        scale, zero = np.ones(LANES, pressures.dtype), np.zeros(LANES, pressures.dtype)
        change, step = np.zeros(LANES, pressures.dtype), np.zeros(LANES, pressures.dtype)
        gain = np.zeros(LANES)
        slope, bend = np.zeros(LANES), np.zeros(LANES)
        turned = np.zeros(LANES, pressures.dtype)
        for first in range(0, columns, size):
            for lane in range(count):
                scale[lane], zero[lane] = scales[first // size, row + lane], zeros[first // size, row + lane]
            if refit:
                slope[:], bend[:] = 0, 0
                for member in range(first, first + size):
                    turned[:] = 0
                    for other in range(first, first + size):
                        factor = curvature[member, other]
                        for lane in range(LANES):
                            turned[lane] += (held[other, lane] - zero[lane]) * factor
                    for lane in range(LANES):
                        apart = held[member, lane] - zero[lane]
                        slope[lane] += np.float64(apart) * pressure[member, lane]
                        bend[lane] += np.float64(apart) * turned[lane]
                for lane in range(LANES):
                    step[lane] = 0
                    if bend[lane] > 0:
                        better = pressures.dtype.type(_signed_half(scale[lane] + slope[lane] / bend[lane]))
                        by = np.float64(better) - scale[lane]
                        fall = 2 * by * slope[lane] - by * by * bend[lane]
                        if better * scale[lane] > 0 and fall > 0:
                            step[lane], scale[lane] = by, better
                            gain[lane] += fall
                for member in range(first, first + size):
                    for lane in range(LANES):
                        change[lane] = step[lane] * (held[member, lane] - zero[lane])
                    _apply(pressure, moved, curvature, member, change)
            if fit_zero:
                whole = 0.0
                slope[:] = 0
                for member in range(first, first + size):
                    for other in range(first, first + size):
                        whole += curvature[member, other]
                    for lane in range(LANES):
                        slope[lane] += pressure[member, lane]
                for lane in range(LANES):
                    change[lane] = 0
                    if whole > 0:
                        wanted = np.rint(zero[lane] - pressures.dtype.type(slope[lane] / whole) / scale[lane])
                        better = min(max(wanted, floor + 1), top)
                        by = np.float64(scale[lane]) * (zero[lane] - better)
                        fall = 2 * by * slope[lane] - by * by * whole
                        if fall > 0:
                            change[lane], zero[lane] = by, better
                            gain[lane] += fall
                for member in range(first, first + size):
                    _apply(pressure, moved, curvature, member, change)
            for column in range(first, first + size):
                diagonal = curvature[column, column]
                for lane in range(LANES):
                    value = scale[lane] * (held[column, lane] - zero[lane])
                    position = (value + pressure[column, lane] / diagonal) / scale[lane] + zero[lane]
                    if len(levels):
                        found = 0
                        for limit in range(len(limits)):
                            found += position > limits[limit]
                        new = levels[found]
                    else:
                        new = np.rint(min(max(position, floor), top))
                    by = scale[lane] * (new - zero[lane]) - value
                    fall = 2 * np.float64(by) * pressure[column, lane] - np.float64(by) * by * diagonal
                    if fall > 0:
                        change[lane], held[column, lane] = by, new
                        gain[lane] += fall
                    else:
                        change[lane] = 0
                _apply(pressure, moved, curvature, column, change)
            for lane in range(count):
                scales[first // size, row + lane], zeros[first // size, row + lane] = scale[lane], zero[lane]
        for lane in range(count):
            gains[row + lane] += gain[lane]
            for column in range(columns):
                changes[row + lane, column] = moved[column, lane]
                if len(levels):
                    found = 0
                    for limit in range(len(limits)):
                        found += held[column, lane] > limits[limit]
                    codes[row + lane, column] = found
                else:
                    codes[row + lane, column] = np.uint8(held[column, lane])
