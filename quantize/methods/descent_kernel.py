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


@numba.njit(parallel=True, cache=True, error_model="numpy")
def descend(
    pressures: Floats, hessian: Floats, damping: Floats, columns: NDArray[np.int64], rest: Floats,
    codes: NDArray[np.uint8], scales: Floats, zeros: Floats, levels: Floats, top: float, size: int, group: int,
    refit: bool, fit_zero: bool, gains: NDArray[np.float64],
) -> None:  # fmt: skip
    """Improve scales, zeros and codes of a block of B ``columns``; see :func:`quantize.methods.descent.descend`.

    ``pressures`` [N, B] is R H at the columns, before damping. The block's first group is number ``group``, and its
    groups have ``size`` columns each. ``rest`` R [N, K] and ``gains`` [N] are updated.
    """
    rows, width = len(codes), len(columns)
    floor = top - top
    limits = (levels[1:] + levels[:-1]) / levels.dtype.type(2)
    curvature = np.empty((width, width), hessian.dtype)
    for one in range(width):
        for other in range(width):
            curvature[one, other] = hessian[columns[one], columns[other]]
        curvature[one, one] += damping[columns[one]]
    two, unit = top - top + 2, top - top + 1
    for tile in numba.prange((rows + LANES - 1) // LANES):
        row = tile * LANES
        count = min(LANES, rows - row)
        pressure = np.zeros((width, LANES), rest.dtype)
        held = np.zeros((width, LANES), rest.dtype)  # what the codes stand for, before scale and zero
        moved = np.zeros((width, LANES), rest.dtype)
        for lane in range(count):
            for place in range(width):
                column = columns[place]
                pressure[place, lane] = pressures[row + lane, place] + rest[row + lane, column] * damping[column]
                code = codes[row + lane, column]
                held[place, lane] = levels[code] if len(levels) else code
        scale, zero, inverse = np.ones(LANES, rest.dtype), np.zeros(LANES, rest.dtype), np.ones(LANES, rest.dtype)
        change, step = np.zeros(LANES, rest.dtype), np.zeros(LANES, rest.dtype)
        gain, slope, bend = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES)
        turned = np.zeros((size, LANES), rest.dtype)  # (code - zero) H
        for first in range(0, width, size):
            number = group + first // size
            for lane in range(count):
                scale[lane], zero[lane] = scales[number, row + lane], zeros[number, row + lane]
            if refit:
                slope[:], bend[:] = 0, 0
                turned[:] = 0
                for member in range(size):
                    for other in range(size):
                        factor = curvature[first + member, first + other]
                        for lane in range(LANES):
                            turned[member, lane] += (held[first + other, lane] - zero[lane]) * factor
                    for lane in range(LANES):
                        apart = np.float64(held[first + member, lane] - zero[lane])
                        slope[lane] += apart * pressure[first + member, lane]
                        bend[lane] += apart * turned[member, lane]
                for lane in range(LANES):
                    step[lane] = 0
                    if bend[lane] > 0:
                        better = rest.dtype.type(_signed_half(scale[lane] + rest.dtype.type(slope[lane] / bend[lane])))
                        by = np.float64(better) - scale[lane]
                        fall = 2 * by * slope[lane] - by * by * bend[lane]
                        if better * scale[lane] > 0 and fall > 0:
                            step[lane], scale[lane] = by, better
                            gain[lane] += fall
                for member in range(size):
                    for lane in range(LANES):
                        moved[first + member, lane] += step[lane] * (held[first + member, lane] - zero[lane])
                        pressure[first + member, lane] -= step[lane] * turned[member, lane]
            if fit_zero:
                whole = 0.0
                slope[:] = 0
                for member in range(size):
                    for other in range(size):
                        whole += curvature[first + member, first + other]
                    for lane in range(LANES):
                        slope[lane] += pressure[first + member, lane]
                for lane in range(LANES):
                    step[lane] = 0
                    if whole > 0:
                        wanted = np.rint(zero[lane] - rest.dtype.type(slope[lane] / whole) / scale[lane])
                        better = min(max(wanted, floor + 1), top)
                        by = np.float64(scale[lane]) * (zero[lane] - better)
                        fall = 2 * by * slope[lane] - by * by * whole
                        if fall > 0:
                            step[lane], zero[lane] = by, better
                            gain[lane] += fall
                for member in range(size):
                    factor = floor
                    for other in range(size):
                        factor += curvature[first + member, first + other]
                    for lane in range(LANES):
                        moved[first + member, lane] += step[lane]
                        pressure[first + member, lane] -= step[lane] * factor
            for later in range(first + size, width) if refit else range(0):  # groups beside this one in the block
                for member in range(first, first + size):
                    factor = curvature[member, later]
                    for lane in range(LANES):
                        pressure[later, lane] -= moved[member, lane] * factor
            for lane in range(LANES):
                inverse[lane] = unit / scale[lane]
            for place in range(first, first + size):
                diagonal = curvature[place, place]
                flat = unit / diagonal
                for lane in range(LANES):
                    position = held[place, lane] + pressure[place, lane] * flat * inverse[lane]
                    if len(levels):
                        found = 0
                        for limit in range(len(limits)):
                            found += position > limits[limit]
                        new = levels[found]
                    else:
                        new = np.rint(min(max(position, floor), top))
                    by = scale[lane] * (new - held[place, lane])
                    fall = by * (two * pressure[place, lane] - by * diagonal)
                    taken = fall > 0
                    change[lane] = by if taken else floor
                    held[place, lane] = new if taken else held[place, lane]
                    gain[lane] += fall if taken else floor
                    moved[place, lane] += change[lane]
                for later in range(place + 1, width):  # the pressure of earlier columns is computed anew when needed
                    factor = curvature[place, later]
                    for lane in range(LANES):
                        pressure[later, lane] -= change[lane] * factor
            for lane in range(count):
                scales[number, row + lane], zeros[number, row + lane] = scale[lane], zero[lane]
        for lane in range(count):
            gains[row + lane] += gain[lane]
            for place in range(width):
                column = columns[place]
                rest[row + lane, column] -= moved[place, lane]
                code = 0
                for limit in range(len(limits)):
                    code += held[place, lane] > limits[limit]
                codes[row + lane, column] = np.uint8(code) if len(levels) else np.uint8(held[place, lane])
