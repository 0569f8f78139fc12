"""Versions of what calibration computes; keys hold them. tests/test_golden.py fails where bytes change and they do not."""

from __future__ import annotations

SAMPLER_VERSION = 2
"""Raised when the same recipe would give other windows of tokens."""
STATISTICS_VERSION = 2
"""Raised when the same source and windows would give other statistics."""
