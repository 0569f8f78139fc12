"""Build every checkpoint of a folder in each format, read it back, and compare its logits with the source's.

Each checkpoint is a folder of its own, as transformers saves tiny random models; the folder may be one checkpoint too.
Rows of the document's table whose checkpoints are not in the folder stay, so that new ones can be tried alone.

A branch is right if its logits, read back from its own bytes by our reader, are as near to the source's (in
transformers) as plain rounding at that width allows: 8 bits must be within ``TIMES`` of rounding to nearest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.document import DOCUMENT, machine, replace_section, table

PAGE = DOCUMENT.with_name("architectures.md")
TEXT = (
    "The ship had been at sea for three weeks when the cook noticed that the last barrel of flour was damp. He told "
    "nobody, baked the bread a little longer, and wrote the number 17 on the lid."
)
TIMES, MARGIN = 3.0, 0.03
SECONDS = 300
VARIANTS: dict[str, dict[str, Any]] = {
    "gptq": {"variants": [{"branch": f"b{bits}", "bits": bits, "group_size": 32} for bits in (4, 8)]},
    "awq": {"variants": [{"branch": "main", "group_size": 32}]},
    "gguf": {"levels": ["Q8_0"]},
}


@dataclass
class Row:
    """What came of one checkpoint.

    Attributes:
        outcome: by method: ``ok`` with a figure, or the sentence that refuses it. left: what stays in 16 bits.
        plan_said_ok: whether the plan of a method that failed had no objection.
    """

    name: str
    model_type: str = ""
    outcome: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    plan_said_ok: dict[str, bool] = field(default_factory=dict)


def run(models: Path, folder: Path) -> list[Row]:
    """Try every checkpoint below ``models``, each in a process of its own, and rewrite their rows of the document."""
    import transformers

    transformers.logging.set_verbosity_error()  # loaded once, before the processes part

    rows = []
    for place in [models] if (models / "config.json").is_file() else sorted(models.iterdir()):
        if (place / "config.json").is_file():
            rows.append(_apart(place, folder / place.name))
            print(json.dumps(rows[-1].__dict__), flush=True)
    write(rows)
    return rows


def _apart(place: Path, folder: Path) -> Row:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_try, args=(place, folder, sending))
    child.start()
    sending.close()
    row = Row(place.name)
    try:
        if receiving.poll(SECONDS):
            row = receiving.recv()
        else:
            row.outcome = dict.fromkeys(VARIANTS, f"CRASH: no answer in {SECONDS} s")
    except EOFError:
        row.outcome = dict.fromkeys(VARIANTS, "CRASH: the process died")
    child.kill()
    child.join()
    return row


def _try(place: Path, folder: Path, answer: Any) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        answer.send(_row(place, folder))


def _row(place: Path, folder: Path) -> Row:
    import quantize
    from quantize.errors import QuantizeError

    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    row, source = Row(place.name, str(config.get("model_type"))), None
    for method, section in VARIANTS.items():
        recipe = folder / f"{method}.json"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(json.dumps({
            "model": {"source": str(place), "name": place.name, "creator": "x", "license": "other"},
            "calibration": {"dataset": "pydoc", "samples": 8, "sequence_length": 64, "batch_tokens": 128},
            method: section,
        }))  # fmt: skip
        loaded, planned = quantize.load_recipe(recipe), False
        try:
            plan = quantize.plan(loaded, quantize.PlanOptions(dist=folder / "dist"))
            planned = plan.gguf is None or plan.gguf.lacking is None
            row.left = row.left or sorted({one.reason for one in plan.table.left if one.block is not None})
            built = quantize.build(loaded, quantize.BuildOptions(dist=folder / "dist", device="cpu"))
            if method == "gguf":
                row.outcome[method] = "ok"
                continue
            source = source or _source(built.plan)
            row.outcome[method] = _judge(built.plan, source)
        except QuantizeError as error:
            row.outcome[method] = f"refused: {error}"
            row.plan_said_ok[method] = planned
        except Exception as error:  # a defect of ours, to be told as one
            row.outcome[method] = f"CRASH: {type(error).__name__}: {str(error)[:200]}"
            row.plan_said_ok[method] = planned
    return row


@dataclass
class _Source:
    ids: list[int]
    logits: Any
    rounded: float


def _source(plan: Any) -> _Source:
    """The source's logits in transformers, and the error of rounding its linears to 8 bits."""
    import torch

    from quantize.calibration.forward import Activations
    from quantize.calibration.tokens import encode, load_tokenizer
    from quantize.source.streamed import StreamedModel

    ids = encode(load_tokenizer(plan.source), TEXT, special=True)[:64]
    model = StreamedModel(plan.source, torch.float32, torch.device("cpu"), head=True, taken=plan.table.names)
    with torch.no_grad():
        theirs = type(model.model).from_pretrained(plan.source.folder, dtype=torch.float32, attn_implementation="eager")
        logits = theirs.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    import numpy as np

    state = Activations(model, np.array([ids], dtype=np.int64), 1)
    for index in range(len(model)):
        with model.block(index) as block:
            for linear in model.linears(block):
                linear.set_weight(_rounded(linear.weight))
            state.advance(index, block)
    return _Source(ids, logits, _error(model.logits(state.ids, state.hidden)[0].float(), logits))


def _rounded(weight: Any) -> Any:
    groups = weight.reshape(weight.shape[0], -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return ((groups / scale).round() * scale).reshape(weight.shape)


def _error(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _judge(plan: Any, source: _Source) -> str:
    from quantize.verifying.forward import logits_of

    found: dict[str, float] = {}
    for item in plan.variants:
        found[item.branch] = _error(logits_of(item.folder, source.ids), source.logits)
    eight = found.get("b8")
    figures = ", ".join(f"{value:.2f}" for value in found.values())
    if eight is not None and eight > TIMES * source.rounded + MARGIN:
        return f"WRONG: {figures}, rounding {source.rounded:.3f}"
    return f"ok {figures}"


def write(rows: Sequence[Row]) -> None:
    """Rewrite these rows of the document's table, in the order of the checkpoints' names; the others stay."""

    def cell(row: Row, method: str) -> str:
        said = row.outcome.get(method, "")
        return said.split(",")[0] if said.startswith("ok") else said.partition(":")[0]

    body = _rows_of(PAGE.read_text(encoding="utf-8"))
    for row in rows:
        kind = row.model_type if row.model_type == row.name else f"{row.model_type} ({row.name})"
        body[row.name] = [kind, *(cell(row, method) for method in VARIANTS), "; ".join(row.left)]
    cells = [body[name] for name in sorted(body)]
    counts = ", ".join(
        f"{method.upper()} {sum(one[place].startswith('ok') for one in cells)}"
        for place, method in enumerate(VARIANTS, start=1)
    )
    head = ["model type", *(method.upper() for method in VARIANTS), "in 16 bits, inside the blocks"]
    text = f"Of {len(cells)} checkpoints: {counts}. {machine()}.\n\n{table(head, cells)}"
    replace_section("checkpoints", text, PAGE)


def _rows_of(document: str) -> dict[str, list[str]]:
    """The table's rows so far, by the checkpoint's name."""
    section = document.partition("<!-- begin checkpoints -->")[2].partition("<!-- end checkpoints -->")[0]
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" |")]
        if line.startswith("|") and len(cells) == len(VARIANTS) + 2 and cells[0] not in ("model type", "---"):
            rows[cells[0].partition(" (")[2].rstrip(")") or cells[0]] = cells
    return rows
