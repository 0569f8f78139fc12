"""What another engine wrote, tensor by tensor, as the branch that was planned: nothing more, nothing less.

Nothing is taken on trust: the linears are held against the source, and everything that the method leaves alone has to
be the source's, whose own bytes are then written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantize.branches.branch import half_bias
from quantize.dist.ledger import LedgerEntry
from quantize.errors import EngineRunError, SourceChanged, SourceError
from quantize.formats import compressed, gptq
from quantize.formats.reader import PARTS, decode
from quantize.formats.safetensors_writer import ShardWriter
from quantize.formats.tensor_file import DTYPES, TensorFile
from quantize.planning.items import PlannedVariant
from quantize.planning.modules import LinearSpec
from quantize.planning.plan import Plan
from quantize.source.checkpoint import read_header
from quantize.source.source_tensors import SourceTensors
from quantize.verifying.tensors import MOST_ERROR, without_scales

Tensors = dict[str, torch.Tensor]


def rewrite(
    plan: Plan, item: PlannedVariant, raw: Path, folder: Path, modules: Sequence[Mapping[str, Any]]
) -> tuple[list[LedgerEntry], Mapping[str, str]]:
    """Write the planned tensors of ``item`` into ``folder``, from what its engine left in ``raw``.

    Args:
        modules: what the engine said of single modules, by ``block`` and ``local``.

    Returns:
        A row for every linear, and the digest of every tensor by name.

    Raises:
        EngineError: the result lacks something, changed what it must not, or is far from the source.
        SourceChanged: the source is not what was hashed.
    """
    title = item.engine.title if item.engine else ""
    try:
        return _Rewriting(plan, item, raw).run(folder, modules)
    except SourceChanged:
        raise
    except (SourceError, KeyError, ValueError) as error:
        reason = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise EngineRunError(f"output of {title} rejected: {reason}") from None


class _Files:
    """Tensors by name, out of all safetensors files of a folder."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.file_of = {name: path for path in paths for name in read_header(path)}
        self._open: dict[Path, TensorFile] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str) -> torch.Tensor:
        if name not in self.file_of:
            raise ValueError(f"{name} is missing")
        path = self.file_of[name]
        if path not in self._open:
            self._open[path] = TensorFile(path)
        return self._open[path].read(name)


class _Rewriting:
    def __init__(self, plan: Plan, item: PlannedVariant, raw: Path) -> None:
        self.plan, self.item, self.variant = plan, item, item.variant
        self.found = _Files(sorted(raw.glob("*.safetensors")))
        self.source = SourceTensors(plan.source)
        self.kind = item.format
        self.config = _quantization_config(raw)

    def run(self, folder: Path, modules: Sequence[Mapping[str, Any]]) -> tuple[list[LedgerEntry], Mapping[str, str]]:
        said = {(row["block"], row["local"]): row for row in modules}
        folder.mkdir(parents=True)
        ledger = []
        with ShardWriter(folder, self.item.layout.shards) as writer:
            replaced: set[str] = set()
            for linear in self.plan.table.linears:
                tensors = self._linear(linear)
                for suffix, tensor in tensors.items():
                    writer.write(f"{linear.name}.{suffix}", tensor)
                    replaced.add(f"{linear.name}.{suffix}")
                ledger.append(self._row(linear, tensors, said.get((linear.block, linear.local), {})))
            for name in (name for shard in self.item.layout.shards.values() for name in shard):
                if name not in replaced:
                    writer.write(name, self._beside(name))
            self._check_nothing_is_left(replaced)
            writer.finish()
        return ledger, writer.checksums

    def _linear(self, linear: LinearSpec) -> Tensors:
        """A linear's tensors in the planned form."""
        parts = {part: self.found.read(f"{linear.name}.{part}") for part in self._parts(linear)}
        if self.kind == "gptq":
            parts = self._gptq(linear, parts)
        name, dtype = ("scales", torch.float16)
        if self.kind == compressed.METHOD:
            name, dtype = "weight_scale", DTYPES[linear.weight.dtype]
        parts[name] = parts[name].to(dtype).contiguous()
        if not bool(torch.isfinite(parts[name]).all()):
            raise ValueError(f"{linear.name}.{name} holds NaN or infinity")
        if bias := self._bias(linear):
            parts |= bias
        return parts

    def _parts(self, linear: LinearSpec) -> Sequence[str]:
        optional = {"g_idx", "weight_zero_point"}
        return [part for part in PARTS[self.kind] if part not in optional or f"{linear.name}.{part}" in self.found]

    def _gptq(self, linear: LinearSpec, parts: Tensors) -> Tensors:
        """In the recipe's ``checkpoint_format``, with a g_idx, which has to be natural without act-order."""
        size = linear.in_features if self.variant.group_size == -1 else self.variant.group_size
        natural = torch.arange(linear.in_features, dtype=torch.int32) // size
        index = parts.get("g_idx", natural).to(torch.int32)
        if getattr(self.variant, "desc_act", False) is not True and not torch.equal(index, natural):
            raise ValueError(f"{linear.name}.g_idx is not in the natural order, though desc_act is not true")
        stored = str(self.config.get("checkpoint_format", "gptq"))
        zeros = gptq.convert_zeros(parts["qzeros"], self.variant.bits, stored, self._checkpoint_format())
        return {"qweight": parts["qweight"], "qzeros": zeros, "scales": parts["scales"], "g_idx": index}

    def _bias(self, linear: LinearSpec) -> Tensors:
        name = f"{linear.name}.bias"
        if linear.bias:
            own = self.found.read(name) if self.kind == "awq" else self._unchanged(name)
            return {"bias": own if self.kind == compressed.METHOD else half_bias(own, linear.name)}
        if self.kind == "gptq" and self.plan.recipe.gptq and self.plan.recipe.gptq.zero_bias:
            return {"bias": torch.zeros(linear.out_features, dtype=torch.float16)}
        return {}

    def _beside(self, name: str) -> torch.Tensor:
        """A tensor that is no part of a linear: the source's, but for what AWQ divides inside the blocks."""
        if name not in self.source:  # scales of an activation
            return self.found.read(name) if name in self.found else torch.ones(self._shape(name), dtype=torch.float16)
        if self.kind != "awq" or not self.plan.table.is_in_block(name):
            return self._unchanged(name)
        own, found = self.source.read(name), self.found.read(name)
        if _same(found, own):
            return own
        if found.shape != own.shape or not bool(torch.isfinite(found).all()):
            raise ValueError(f"{name} has shape {list(found.shape)}, or holds NaN or infinity")
        return found.to(own.dtype)

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(shard[name].shape for shard in self.item.layout.shards.values() if name in shard)

    def _unchanged(self, name: str) -> torch.Tensor:
        """The source's tensor; what the engine has in its place must not be another one."""
        own = self.source.read(name)
        if name in self.found and not _same(self.found.read(name), own):
            raise ValueError(f"{name} is not the source's, though {self.item.method.upper()} leaves it alone")
        return own

    def _row(self, linear: LinearSpec, tensors: Tensors, said: Mapping[str, Any]) -> LedgerEntry:
        error = self._weight_error(linear, tensors)
        known = {name: said[name] for name in ("damp_percent", "tokens") if name in said}
        if self.kind != "awq":  # whose columns are scaled, nobody tells by how much
            known["weight_error"] = error
        return LedgerEntry(linear.name, str(said.get("outcome", "external")), **known)

    def _weight_error(self, linear: LinearSpec, tensors: Tensors) -> float:
        weight = decode(self.kind, tensors, self.variant.bits, self._checkpoint_format())
        own = self.source.read(f"{linear.name}.weight")
        own = own.float().t() if linear.transposed else own.float()
        if own.shape != weight.shape:
            raise ValueError(f"{linear.name} decodes to {list(weight.shape)}, the source has {list(own.shape)}")
        if self.kind == "awq":
            weight = without_scales(weight, own)
        share = float((weight - own).square().sum() / own.square().sum().clamp(min=1e-30))
        if not share <= MOST_ERROR[self.variant.bits] ** 2:
            raise ValueError(f"{linear.name} is off by {share**0.5:.3f} of its norm from the source")
        return float(f"{share:.6g}")

    def _checkpoint_format(self) -> str:
        return self.plan.recipe.gptq.checkpoint_format if self.plan.recipe.gptq else "gptq"

    def _check_nothing_is_left(self, written: set[str]) -> None:
        quantized = (".qweight", ".weight_packed")
        extra = [name for name in self.found.file_of if name.endswith(quantized) and name not in written]
        if extra:
            raise ValueError(f"it quantized {extra[0].rpartition('.')[0]} too")


def _same(found: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether ``found`` is ``own``, or what is left of it in a narrower dtype."""
    return found.shape == own.shape and (
        torch.equal(found.to(own.dtype), own) or torch.equal(found, own.to(found.dtype))
    )


def _quantization_config(raw: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((raw / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError("it has no config.json with a quantization_config") from None
