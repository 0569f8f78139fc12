"""``propagate: auto``: the cheapest way that keeps a variant's perplexity, by the tables of docs/propagation.md."""

from __future__ import annotations

from quantize.recipe.methods import AwqVariant, Variant

FEWEST_SHARED_BITS = 4
"""From here up, statistics of the source model, which all variants share, lose nothing that was measured."""


def with_propagation(variant: Variant) -> Variant:
    """``variant`` with ``propagate`` decided: ``source`` or ``quantized``, never ``auto``. AWQ's is the source's."""
    if isinstance(variant, AwqVariant) or variant.propagate != "auto":
        return variant
    chosen = "source" if variant.bits >= FEWEST_SHARED_BITS else "quantized"
    return variant.model_copy(update={"propagate": chosen})
