"""Compare every tensor of a GPTQ or AWQ branch with its source: name, shape, finite values, relative error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from quantize.dist.manifest import read_manifest
from quantize.errors import SourceError
from quantize.formats.reader import BranchReader
from quantize.formats.tensor_file import TensorFile
from quantize.source.anatomy import Anatomy
from quantize.source.checkpoint import read_header, with_slices
from quantize.source.dequantize import read_float8
from quantize.source.examination import anatomy_of
from quantize.source.resolved import Source
from quantize.source.stacked import StackedTensors
from quantize.verifying.checks import Check

MOST_ERROR = {2: 0.9, 3: 0.5, 4: 0.3, 8: 0.05}
"""||W - Q|| / ||W|| above which a linear is considered destroyed; rounding alone gives at most half of it."""

HALF_ROUNDING = 2.0**-10
"""Most that rounding to float16 changes a tensor, of its norm."""


def check_tensors(folder: Path, source: Source | None) -> Check:
    """Compare the tensors of ``folder`` with the source's; skipped without a source."""
    if source is None:
        return Check("tensors", "skipped", "there is no source to compare with; name it with --source")
    try:
        reader = BranchReader(folder)
        stored = {name for file in sorted(folder.glob("*.safetensors")) for name in read_header(file)}
        packed = reader.packed
    except (SourceError, OSError, KeyError, ValueError) as error:
        return Check("tensors", "failed", f"cannot be read: {error}")
    anatomy = _anatomy(source)
    if anatomy is not None:
        source = replace(source, checkpoint=with_slices(source.checkpoint, anatomy.slices))
    turned = {found.name for found in anatomy.linears if found.transposed} if anatomy else set()
    original, folds = _Original(source), _Folds(folder, reader.method)
    wrong, quantized, worst, farthest = [], 0, 0.0, ""
    for name in source.checkpoint.tensors:
        module = name.removesuffix(".weight")
        is_packed = name.endswith(".weight") and module in packed
        if not is_packed and name not in stored:
            wrong.append(f"{name} is missing")
            continue
        try:
            values = reader.weight(module) if is_packed else reader.tensor(name).float()
            wanted = original.tensor(name).float()
            problem, share = _compare(values, wanted.t() if is_packed and module in turned else wanted, name, folds)
        except (OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
            wrong.append(f"{name} cannot be read ({error})")
            continue
        # the bias of a quantized linear is stored in float16
        limit = MOST_ERROR[reader.bits] if is_packed else HALF_ROUNDING * (name.removesuffix(".bias") in packed)
        if problem or share > limit:
            wrong.append(f"{name} {problem or f'is off by {share:.3f} of its norm'}")
        quantized += is_packed
        if is_packed and share > worst:
            worst, farthest = share, module
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Check("tensors", "failed", ", ".join(wrong[:3]) + more)
    tail = f", the largest relative error is {worst:.3f} in {farthest}" if farthest else ""
    return Check("tensors", "ok", f"{quantized} linears match the source{tail}; all other tensors are equal")


class _Folds:
    """AWQ: which linears' inputs were multiplied by scales, and which modules were divided by them, from the ledger."""

    def __init__(self, folder: Path, method: str) -> None:
        data = read_manifest(folder) or {}
        ledger = data.get("ledger", [])
        # external engines do not report what they scaled: it may be any column, row or norm
        self.unknown = bool(data.get("engine")) and method == "awq"
        self.multiplied = {entry["module"] for entry in ledger if entry.get("scale_folded_into")}
        self.divided = {entry["scale_folded_into"] for entry in ledger if entry.get("scale_folded_into")}

    def undo(self, values: torch.Tensor, wanted: torch.Tensor, name: str) -> torch.Tensor:
        """``values`` [N, K] with the best-fitting scale of each column or row removed; a norm becomes the source's."""
        module = name.rpartition(".")[0]
        if (module in self.divided or self.unknown) and values.dim() == 1:
            return wanted
        if (module in self.multiplied or self.unknown) and values.dim() == 2:
            values = values * _fit(values, wanted, 0)
        if module in self.divided or self.unknown:
            values = values * _fit(values, wanted, 1)
        return values


def without_scales(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``values`` [N, K] with the best-fitting scale of each column, and then of each row, removed."""
    values = values * _fit(values, wanted, 0)
    return values * _fit(values, wanted, 1)


def _fit(values: torch.Tensor, wanted: torch.Tensor, over: int) -> torch.Tensor:
    product, square = (values * wanted).sum(over, keepdim=True), values.square().sum(over, keepdim=True)
    return torch.where(square > 0, product / square.clamp(min=1e-30), torch.ones_like(square))


def _anatomy(source: Source) -> Anatomy | None:
    """Which linears are transposed or stacked in the source; None of a model that we do not quantize."""
    try:
        return anatomy_of(source, here=True)
    except SourceError:  # a branch of another tool
        return None


class _Original:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.files: dict[str, TensorFile] = {}
        self.stacked = StackedTensors(self.whole)

    def tensor(self, name: str) -> torch.Tensor:
        one = self.source.checkpoint.slices.get(name)
        return self.whole(name) if one is None else self.stacked.take(one)

    def whole(self, name: str) -> torch.Tensor:
        one = self.source.checkpoint.float8.get(name)
        return self.stored(name) if one is None else read_float8(name, one, self.stored)

    def stored(self, name: str) -> torch.Tensor:
        file = self.source.checkpoint.in_headers[name].file
        if file not in self.files:
            self.files[file] = TensorFile(self.source.folder / file)
        return self.files[file].read(name)


def _compare(values: torch.Tensor, wanted: torch.Tensor, name: str, folds: _Folds) -> tuple[str, float]:
    """What is wrong with a tensor (empty if nothing), and its error relative to the source's norm."""
    if values.shape != wanted.shape:
        return f"has shape {list(values.shape)}, the source {list(wanted.shape)}", 0.0
    if not bool(torch.isfinite(values).all()):
        return "contains NaN or infinity", 0.0
    off = folds.undo(values, wanted, name) - wanted
    return "", float(off.norm() / wanted.norm().clamp(min=1e-12))
