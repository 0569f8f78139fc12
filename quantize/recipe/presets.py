"""Named calibration texts: what ``calibration.dataset: wikitext`` stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A text by name: a hub dataset's split and column, or (``hub`` None) one that needs no network.

    ``split`` is the training text but for presets that are there to measure on.
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
"""``pydoc`` is the language reference that every CPython carries in ``pydoc_data.topics``; ``docstrings`` are those
of its library's larger modules, another text in the same language, to measure on."""
