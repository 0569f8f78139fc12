"""A linear of a loaded block, in one orientation whatever its module stores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.source.experts import Expert


@dataclass(frozen=True)
class Linear:
    """A linear of a loaded block. ``weight`` is [out_features, in_features], whatever layout the module stores.

    Attributes:
        local: its name in the block. expert: the expert that it belongs to, which only some tokens reach, or None.
    """

    local: str
    module: nn.Module
    expert: Expert | None = None

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.t() if isinstance(self.module, Conv1D) else weight

    def set_weight(self, weight: torch.Tensor) -> None:
        """Replace the weight's values by [out_features, in_features] values."""
        with torch.no_grad():
            self.weight.copy_(weight)
