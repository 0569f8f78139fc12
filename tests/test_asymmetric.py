"""The weight that leans towards the source's outputs."""

from __future__ import annotations

import torch

from quantize.executors.api import Job
from quantize.executors.local import solve_job
from quantize.methods.asymmetric import toward_source
from quantize.methods.gptq import GptqParameters, solve

TOKENS, COLUMNS, ROWS = 4096, 64, 24


def drifted(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the source's inputs, and inputs that shrank and got noisy on the way."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64)
    source = torch.randn(TOKENS, COLUMNS, generator=random, dtype=torch.float64)
    return weight, source, 0.7 * source + noise * torch.randn(TOKENS, COLUMNS, generator=random, dtype=torch.float64)


def test_without_drift_the_weight_stays() -> None:
    weight, source, _ = drifted(0.1)
    hessian = source.t() @ source
    assert torch.equal(toward_source(weight, hessian, torch.zeros_like(hessian)), weight)


def test_outputs_come_nearer_to_the_sources_on_other_tokens() -> None:
    weight, source, inputs = drifted(0.1)
    known, held_out = slice(0, TOKENS // 2), slice(TOKENS // 2, None)
    hessian, drift = inputs[known].t() @ inputs[known], (source - inputs)[known].t() @ inputs[known]
    target = toward_source(weight, hessian, drift)

    def distance(candidate: torch.Tensor) -> float:
        return float((source[held_out] @ weight.t() - inputs[held_out] @ candidate.t()).square().mean())

    assert distance(target) < 0.75 * distance(weight)


def test_a_channel_that_is_always_zero_keeps_its_weights() -> None:
    weight, source, inputs = drifted(0.1)
    source[:, 5] = inputs[:, 5] = 0
    target = toward_source(weight, inputs.t() @ inputs, (source - inputs).t() @ inputs)
    assert torch.equal(target[:, 5], weight[:, 5])
    assert bool(torch.isfinite(target).all())


def test_the_drift_is_damped_by_the_rule_of_the_branch() -> None:
    weight, source, inputs = drifted(0.1)
    source[:, 5], inputs[:, 5] = 40 * source[:, 5], 40 * inputs[:, 5]  # massive
    hessian, drift = inputs.t() @ inputs, (source - inputs).t() @ inputs
    own, mean = (toward_source(weight, hessian, drift, rule) for rule in ("own", "mean"))
    assert torch.equal(toward_source(weight, hessian, drift), own)
    assert not torch.equal(own, mean)
    for rule, target in (("own", own), ("mean", mean)):
        asked = [GptqParameters(8, 16, damping=rule)]
        found = solve_job(Job(weight, hessian, drift, asked, False, None)).solutions[0]
        assert torch.equal(found.codes, solve(target, hessian, asked)[0].codes)
