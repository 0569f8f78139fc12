"""What a module of stacked experts computes: its attributes, which transformers gives it, or a trial, say it."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from quantize.source.experts import DenseExperts, Expert, Experts, Gate, PassingExperts


@dataclass(frozen=True)
class Form:
    """What a module of stacked experts computes: ``down(gate(first(x)))`` for each expert.

    Attributes:
        first, down: names of its parameters. width, inner: inputs of an expert, and of its ``down``. halves: outputs
            of ``first`` for each input of ``down``: 2 with a gate. transposed: stacked as [in_features, out_features].
        interleaved: outputs of gate and up alternate. dense: every expert gets a copy of all tokens. passing: how many
            numbers beyond the experts stand for experts that answer with their input.
    """

    first: str
    count: int
    width: int
    inner: int
    halves: int
    transposed: bool
    interleaved: bool
    bias: bool
    gate: Gate
    dense: bool = False
    passing: int = 0
    down: str = "down_proj"

    @property
    def matrices(self) -> tuple[str, str]:
        """Names of the parameters that hold matrices."""
        return self.first, self.down


def form_of(module: nn.Module) -> Form | None:
    """The form of a module on the meta device; None if it has no stacked experts, or computes something else."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if "down_proj" not in shapes or len(shapes["down_proj"]) != 3:
        return None
    if hasattr(module, "has_gate") and not getattr(module, "has_post_expert_norm", False):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        transposed, bias = bool(module.is_transposed), bool(module.has_bias)
        gate: Any = module._apply_gate if module.has_gate else module.act_fn
        interleaved, dense = bool(module.has_gate and not module.is_concatenated), False
    elif not hasattr(module, "act_fn"):
        return None
    elif (arguments := list(signature(type(module).forward).parameters)[1:]) == ["hidden_states"]:
        first, transposed, bias, interleaved, dense = "gate_up_proj", True, False, False, True
        gate = _gated_by(module.act_fn)
    elif arguments == ["hidden_states", "top_k_index", "top_k_weights"]:
        return _shown(module, shapes)
    else:
        return None
    expected = {first, "down_proj", *((f"{first}_bias", "down_proj_bias") if bias else ())}
    if set(shapes) != expected or len(shapes[first]) != 3:
        return None
    count, inner, width = shapes["down_proj"] if transposed else _swapped(shapes["down_proj"])
    outputs = shapes[first][2] if transposed else shapes[first][1]
    halves = 2 if first == "gate_up_proj" else 1
    if (
        shapes[first] != ((count, width, outputs) if transposed else (count, outputs, width))
        or outputs != halves * inner
    ):
        return None
    return Form(first, count, width, inner, halves, transposed, interleaved, bias, gate, dense)


def _gated_by(act: Any) -> Gate:
    def gate(hidden: torch.Tensor) -> torch.Tensor:
        gated, up = hidden.chunk(2, dim=-1)
        found: torch.Tensor = act(gated) * up
        return found

    return gate


def _shown(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Form | None:
    """The usual form, with or without numbers beyond the experts, if a run of the module on drawn numbers gives it."""
    if set(shapes) != {"gate_up_proj", "down_proj"} or len(shapes["gate_up_proj"]) != 3:
        return None
    count, width, inner = shapes["down_proj"]
    if shapes["gate_up_proj"][0] < count or shapes["gate_up_proj"][1:] != (2 * inner, width):
        return None
    gate = _gated_by(module.act_fn)
    dice = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape[1:], generator=dice) / shape[2] ** 0.5 for name, shape in shapes.items()}
    tokens, weights = torch.randn((2, width), generator=dice), torch.rand((2, 2), generator=dice)
    through = gate(tokens @ drawn["gate_up_proj"].t()) @ drawn["down_proj"].t()
    saved = dict(module._parameters)
    try:
        for name, matrix in drawn.items():  # the same for every expert, so that they take the memory of one
            module._parameters[name] = nn.Parameter(matrix.expand(shapes[name]), requires_grad=False)
        for beyond in (True, False):
            last = count if beyond else count - 1
            index = torch.tensor([[0, last], [last, count - 1]])
            kinds = torch.where((index < count)[..., None], through[:, None], tokens[:, None])
            wanted = (kinds * weights[..., None]).sum(1)
            if _answers(module, (tokens, index, weights), wanted):
                more = max(1, shapes["gate_up_proj"][0] - count) if beyond else 0
                return Form("gate_up_proj", count, width, inner, 2, False, False, False, gate, passing=more)
    finally:
        module._parameters.update(saved)
    return None


@torch.inference_mode()
def _answers(module: nn.Module, arguments: tuple[torch.Tensor, ...], wanted: torch.Tensor) -> bool:
    try:
        found = module(*arguments)
    except Exception:  # a number beyond its experts is an error of its own code
        return False
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4)


def _swapped(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[1]


def experts_of(form: Form, module: nn.Module, first: list[str], down: str) -> Experts:
    """Linears on the meta device in place of a module; ``first`` and ``down`` are their names in each expert."""
    dtype = next(module.parameters()).dtype

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=form.bias, device="meta", dtype=dtype)

    outputs = form.halves * form.inner // len(first)
    kind = DenseExperts if form.dense else PassingExperts if form.passing else Experts
    experts = kind(
        Expert(
            {name: linear(form.width, outputs) for name in first},
            {down: linear(form.inner, form.width)},
            _alternating(form.gate) if form.interleaved else form.gate,
        )
        for _ in range(form.count)
    )
    experts.numbers = form.count + form.passing
    return experts


def _alternating(gate: Gate) -> Gate:
    """The gate of a module whose outputs of gate and up alternate, for outputs that follow one another."""
    return lambda hidden: gate(torch.stack(hidden.chunk(2, dim=-1), dim=-1).flatten(-2))
