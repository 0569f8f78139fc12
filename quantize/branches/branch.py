"""A branch in the making: its open shards, and the ledger of its modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from quantize.dist.ledger import LedgerEntry
from quantize.errors import SolveError, SourceError
from quantize.formats.safetensors_writer import ShardWriter
from quantize.methods.gptq import Solution
from quantize.methods.sums import total
from quantize.planning.items import PlannedVariant
from quantize.recipe.methods import ExpertTokens
from quantize.source.routing import expert_of

LEAST_SHARE = 1e-3
"""Of a module's output, in squares, that comes from weights whose scale leaves float16: less is not worth a word."""
TINIEST = sys.float_info.min


@dataclass
class Branch:
    """A branch in the making.

    Attributes:
        fail_on: outcomes that the recipe makes errors.
        min_expert_tokens: fewest tokens that an expert's linear is to see.
        ledger: rows so far. written: checksums of the tensors that an interrupted build has written, by name; None of a
            new one.
    """

    item: PlannedVariant
    folder: Path
    fail_on: tuple[str, ...] = ()
    min_expert_tokens: ExpertTokens = "in_features"
    ledger: list[LedgerEntry] = field(default_factory=list)
    written: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._noted_rows = len(self.ledger)

    def __enter__(self) -> Branch:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer = ShardWriter(self.folder, self.item.layout.shards, self.written).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    def write(self, module: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a quantized module's tensors, by suffix."""
        for suffix, tensor in tensors.items():
            self.writer.write(f"{module}.{suffix}", tensor)

    def take_unnoted(self) -> tuple[list[LedgerEntry], dict[str, str]]:
        """Rows of the ledger, and checksums of written tensors by name, that are new since this was asked last."""
        rows, self._noted_rows = self.ledger[self._noted_rows :], len(self.ledger)
        return rows, self.writer.take_new_checksums()

    def record(
        self,
        module: str,
        solution: Solution,
        rows: slice,
        *,
        energy: torch.Tensor,
        tokens: int,
        scale_ratio: float | None = None,
        scale_folded_into: str | None = None,
    ) -> None:
        """Enter into the ledger how the ``rows`` of a solve, which are this module's, came out.

        Args:
            energy: tr(W H W^T) split by rows, [N].

        Raises:
            SolveError: an outcome that the recipe makes an error.
        """
        happened = {
            "starved_expert": expert_of(module) is not None and tokens < self._fewest_tokens(solution),
            "rtn_fallback": solution.fallback is not None,
            "damp_raised": solution.damp_raised,
            **_range_outcomes(solution, rows, energy[rows]),
            "unscaled": scale_ratio is not None and scale_folded_into is None,
        }
        whole = total(energy[rows])
        entry = LedgerEntry(
            module=module,
            outcome=next((outcome for outcome, is_so in happened.items() if is_so), "solved"),
            damp_percent=float(f"{solution.damp_percent:.6g}"),
            damping=solution.damping,
            dead_columns=solution.dead_columns,
            relative_error=float(f"{total(solution.row_error[rows]) / whole:.6g}") if whole > 0 else 0.0,
            tokens=tokens,
            scale_ratio=scale_ratio if scale_folded_into else None,
            scale_folded_into=scale_folded_into,
        )
        for fatal in self.fail_on:
            if happened.get(fatal) or (fatal == "dead_columns" and entry.dead_columns):
                seen = f" ({tokens} tokens)" if fatal == "starved_expert" else ""
                raise SolveError(
                    f"{module}: {fatal}{seen}, which {self.item.method}.fail_on of the recipe makes an error"
                )
        self.ledger.append(entry)

    def _fewest_tokens(self, solution: Solution) -> int:
        """Of an expert's linear; one that saw none is starved whatever was asked for."""
        return solution.codes.shape[1] if self.min_expert_tokens == "in_features" else max(1, self.min_expert_tokens)


def _range_outcomes(solution: Solution, rows: slice, energy: torch.Tensor) -> dict[str, bool]:
    """Whether float16 holds no small or no large enough scale for weights that matter to the module's output."""
    if solution.out_of_range is None:
        return {}
    shares = solution.out_of_range[:, rows] @ energy / max(total(energy), TINIEST)
    return dict(zip(("scale_underflow", "scale_overflow"), (shares > LEAST_SHARE).tolist(), strict=True))


def half_bias(tensor: torch.Tensor, module: str) -> torch.Tensor:
    """A bias in float16, as the GPTQ and AWQ formats store it.

    Raises:
        SourceError: it does not fit.
    """
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise SourceError(f"{module}.bias: does not fit float16, in which quantized linears store a bias")
    return half
