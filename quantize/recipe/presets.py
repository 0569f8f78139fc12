"""Named calibration texts, such as ``wikitext`` in ``calibration.dataset: wikitext``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A named text: a hub dataset's split and column, or (``hub`` None) one that needs no network.

    ``split`` is the training split, except for presets meant for measuring.
    """

    title: str
    url: str
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"


PRESETS: dict[str, Preset] = {
    "wikitext": Preset(
        "wikitext",
        "https://huggingface.co/datasets/Salesforce/wikitext/viewer/wikitext-2-raw-v1/train",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
    ),
    "wikitext-test": Preset(
        "wikitext (test)",
        "https://huggingface.co/datasets/Salesforce/wikitext/viewer/wikitext-2-raw-v1/test",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    ),
    "pydoc": Preset("pydoc", "https://docs.python.org/3/reference/"),
    "docstrings": Preset("docstrings", "https://docs.python.org/3/library/"),
}
"""``pydoc`` is the language reference that every CPython ships in ``pydoc_data.topics``; ``docstrings`` are those of
larger modules of its library: another text in the same language, for measuring."""
