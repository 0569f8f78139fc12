"""``propagate: auto``: the cheapest choice without loss of perplexity, from the tables of docs/solver.md."""

from __future__ import annotations

from quantize.recipe.methods import AwqVariant, Variant

FEWEST_SHARED_BITS = 4
"""From this width up, no loss was measured with the source model's statistics, which all variants share."""


def with_propagation(variant: Variant) -> Variant:
    """``variant`` with ``propagate`` resolved to ``source`` or ``quantized``; for AWQ it is ``source``."""
    if isinstance(variant, AwqVariant) or variant.propagate != "auto":
        return variant
    chosen = "source" if variant.bits >= FEWEST_SHARED_BITS else "quantized"
    return variant.model_copy(update={"propagate": chosen})
