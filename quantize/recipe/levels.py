"""GGUF levels: their names, llama.cpp's numbers and uses. Pure data.

Source: ``llama_ftype`` and the option table of llama-quantize (llama.cpp of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """One GGUF level.

    Attributes:
        ftype: llama.cpp's ``llama_ftype``.
        use: recommended use, in a few words.
        needs_imatrix: whether llama.cpp refuses it without an importance matrix.
        wide: whether embedding and output stay at Q8_0 (the ``_L`` levels).
    """

    ftype: int
    use: str
    needs_imatrix: bool = False
    wide: bool = False


LEVELS: dict[str, Level] = {
    "F32": Level(0, "full width, larger than any use requires"),
    "BF16": Level(32, "full width in most models' own type, for quantizing again"),
    "F16": Level(1, "full width, for quantizing again"),
    "Q8_0": Level(7, "practically as good as full width"),
    "Q6_K": Level(18, "nearly as good as full width"),
    "Q5_K_M": Level(17, "very high quality, recommended"),
    "Q5_K_S": Level(16, "high quality, recommended"),
    "Q5_1": Level(9, "legacy; prefer Q5_K_M"),
    "Q5_0": Level(8, "legacy; prefer Q5_K_S"),
    "Q4_K_M": Level(15, "good balance of quality and size, the usual choice, recommended"),
    "Q4_K_S": Level(14, "slightly lower quality, smaller, recommended"),
    "Q4_1": Level(3, "legacy; fast on some processors"),
    "Q4_0": Level(2, "legacy; repacked at run time for ARM and AVX"),
    "IQ4_NL": Level(25, "like IQ4_XS, slightly larger; repacked for ARM"),
    "IQ4_XS": Level(30, "decent quality, smaller than Q4_K_S, recommended"),
    "Q3_K_L": Level(13, "lower quality, for limited memory"),
    "Q3_K_M": Level(12, "low quality"),
    "Q3_K_S": Level(11, "low quality; prefer IQ3_XS"),
    "IQ3_M": Level(27, "medium-low quality, near Q3_K_M"),
    "IQ3_S": Level(26, "low quality, better than Q3_K_S at its size"),
    "IQ3_XS": Level(22, "low quality, better than Q3_K_S"),
    "IQ3_XXS": Level(23, "low quality, near Q3_K_S", needs_imatrix=True),
    "Q2_K": Level(10, "very low quality, but usable"),
    "Q2_K_S": Level(21, "very low quality", needs_imatrix=True),
    "IQ2_M": Level(29, "very low quality, but surprisingly usable", needs_imatrix=True),
    "IQ2_S": Level(28, "very low quality", needs_imatrix=True),
    "IQ2_XS": Level(20, "very low quality", needs_imatrix=True),
    "IQ2_XXS": Level(19, "lowest quality that is still coherent", needs_imatrix=True),
    "IQ1_M": Level(31, "extremely low quality, experimental", needs_imatrix=True),
    "IQ1_S": Level(24, "extremely low quality, experimental", needs_imatrix=True),
    "TQ2_0": Level(37, "ternary models only"),
    "TQ1_0": Level(36, "ternary models only"),
    "MXFP4": Level(38, "models trained in MXFP4 (experts only)"),
}
LEVELS |= {
    f"{base.removesuffix('_M').removesuffix('_L')}_{suffix}": Level(
        LEVELS[base].ftype, f"{base} with embedding and output at Q8_0", LEVELS[base].needs_imatrix, wide=True
    )
    for base, suffix in (("Q6_K", "L"), ("Q5_K_M", "L"), ("Q4_K_M", "L"), ("Q3_K_L", "XL"), ("Q2_K", "L"))
}

MMPROJ = "mmproj-F16"
"""Not a level: the name, among the files of a GGUF repo, of a model's encoder and projector of images or sound."""


def bits_of(level: str) -> int:
    """Nominal bits of a weight, as in the level's name: 4 of ``Q4_K_M``, 2 of ``IQ2_XS``, 16 of ``BF16``."""
    return int("".join(itertools.takewhile(str.isdigit, level.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))))


TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4",
)  # fmt: skip
"""Types allowed for single tensors."""

LEVEL_SETS: dict[str, tuple[str, ...]] = {
    "published": (
        "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
    ),
    "imatrix": (
        "Q8_0", "Q6_K_L", "Q6_K", "Q5_K_L", "Q5_K_M", "Q5_K_S", "Q4_K_L", "Q4_1", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL",
        "IQ4_XS", "Q3_K_XL", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K_L", "Q2_K", "IQ2_M",
        "IQ2_S",
    ),
}  # fmt: skip
"""Named sets: the levels of published GGUF repos in 2023, and those of imatrix publishers today."""
