"""Bytes are pinned: what computes otherwise than before has to raise its version number, by which keys change.

``golden.json`` holds each number and the hashes that were made under it. A changed hash under the old number fails, and
so does a raised number with the old hashes. Raise the number first, then renew its hashes: ``python
tests/test_golden.py``, which leaves numbers alone that were not raised.

Inputs are integers, scaled by powers of two, and solves run in float64, so that the hashes are the same on every x86
processor; what is hashed is what reaches a file: codes and float16 scales, exact sums, figures of five digits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import torch
from torch import nn

from quantize.calibration.statistics import Collector
from quantize.calibration.tokens import SAMPLER_VERSION, sample_tokens
from quantize.formats import awq as awq_format
from quantize.formats import gptq as gptq_format
from quantize.gguf.toolchain import VERSION as LLAMA_VERSION
from quantize.measuring import VERSION as MEASURE_VERSION
from quantize.methods.asymmetric import toward_source
from quantize.methods.awq import AwqParameters, divided, quantize_scaled, search_scales
from quantize.methods.gptq import GptqParameters, Solution, round_to_nearest, solve
from quantize.planning.keys import SOLVER_VERSION, STATISTICS_VERSION
from quantize.planning.levels import LEVELS_VERSION
from quantize.recipe.levels import LEVELS
from quantize.recipe.schema import Calibration
from quantize.source.linear import Linear

TABLE = Path(__file__).with_name("golden.json")
ROWS, COLUMNS = 24, 192
Part = Callable[[str], str]


def digest(*parts: Any) -> str:
    """Of tensors' bytes and of other values' texts."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            found.update(part.contiguous().numpy().tobytes())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()[:16]


def integers(seed: int, *shape: int, most: int = 9) -> torch.Tensor:
    """The same on every machine, float64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).integers(-most, most + 1, shape)).double()


# -- SOLVER_VERSION


ORDERS: dict[str, dict[str, Any]] = {
    "natural": {"act_group_aware": False},
    "group-aware": {},
    "act-order": {"desc_act": True},
    "static": {"desc_act": "static"},
}
GPTQ = {
    f"gptq {bits} bits, {size}, {order}, {'symmetric' if sym else 'asymmetric'}{', whole range' if not mse else ''}": (
        GptqParameters(bits, size, sym=sym, mse=mse, damp_percent=0.05, **ORDERS[order])
    )
    for (bits, size, mse), order, sym in itertools.product(
        ((2, 32, True), (3, 64, True), (4, 64, True), (4, -1, False), (8, 32, True)), ORDERS, (True, False)
    )
}
AWQ = {
    f"awq {bits} bits, {size}, {'zero point' if zero else 'symmetric'}, {rounding}": AwqParameters(
        size, bits, zero_point=zero, rounding=rounding
    )
    for (bits, size), zero, rounding in itertools.product(((4, 32), (4, -1)), (True, False), ("gptq", "nearest"))
}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, H of correlated inputs of unequal strength, and a drift."""
    weight = integers(1, ROWS, COLUMNS, most=127) / 512
    strengths = torch.from_numpy(2.0 ** (np.arange(COLUMNS) * 7 % 5))
    inputs = (integers(2, 512, COLUMNS) + integers(3, 512, 1)) * strengths
    return weight, inputs.t() @ inputs, integers(4, 512, COLUMNS).t() @ inputs / 4


def of_solution(solution: Solution) -> list[torch.Tensor]:
    return [solution.codes, solution.scales, solution.zeros, solution.g_idx]


def solved(name: str) -> str:
    weight, hessian, drift = problem()
    if name in GPTQ:
        return digest(*of_solution(solve(weight, hessian, [GPTQ[name]])[0]))
    if name in AWQ:
        found = search_scales(weight, hessian, AWQ[name])
        stored, real = divided(integers(5, COLUMNS).half() / 8 + 2, found.scale)
        return digest(found.ratio, stored, *of_solution(quantize_scaled(weight, hessian, real, AWQ[name])))
    parameters = GptqParameters(4, 64)
    if name == "propagate":
        return digest(*of_solution(solve(toward_source(weight, hessian, drift), hessian, [parameters])[0]))
    if name == "singular":  # damping is raised, and one channel is dead
        hessian[:] = 1
        hessian[3] = hessian[:, 3] = 0
        solution = solve(weight, hessian, [GptqParameters(4, 64, damp_percent=0.0)])[0]
        return digest(solution.damp_percent, *of_solution(solution))
    solution = round_to_nearest(weight, hessian, parameters)
    if name == "rounded to nearest":
        return digest(*of_solution(solution))
    parts = solution.codes, solution.scales, solution.zeros
    if name == "packed for awq":
        return digest(*awq_format.encode(*parts).values())
    assert name == "packed for gptq"
    return digest(*gptq_format.encode(*parts, solution.g_idx, bits=4, checkpoint_format="gptq").values())


SOLVES = [*GPTQ, *AWQ, "propagate", "singular", "rounded to nearest", "packed for gptq", "packed for awq"]


# -- SAMPLER_VERSION


class _Tokenizer:
    """Words by their lengths; a BOS before each prompt."""

    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [1 + sum(map(ord, word)) % 97 for word in text.split()]}


def sampled(name: str) -> str:
    texts = [" ".join(str(number * factor) for number in range(3000)) for factor in (7, 11)]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / f"{number}.txt" for number in range(len(texts))]
        for place, text in zip(places, texts, strict=True):
            place.write_text(text, encoding="utf-8")
        corpora = [str(place) for place in places[: 1 if name == "one text" else 2]]
        calibration = Calibration(dataset=corpora, samples=5, sequence_length=16, seed=3)  # type: ignore[arg-type]
        return sample_tokens(calibration, _Tokenizer()).sha256[:16]


# -- STATISTICS_VERSION


class _Block(nn.Module):
    """Two linears that share an input, and one that reads their product: all exact in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(200, 8, False), nn.Linear(200, 8, False), nn.Linear(8, 4, False)
        for seed, linear in enumerate((self.one, self.two, self.three)):
            linear.weight.data = integers(seed, *linear.weight.shape, most=1).float()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.three((self.one(inputs) - self.two(inputs)) % 7)


def gathered(name: str) -> str:
    block = _Block()
    linears = [Linear(local, module) for local, module in block.named_children()]
    watch = Collector(linears, record=name == "drift")
    streams = [Collector(linears, source=watch)] if name == "drift" else []
    parts: list[Any] = []
    with torch.inference_mode():
        for batch in range(3):
            inputs = integers(10 + batch, 1, 5 + batch, 200, most=3).float()
            for collector, given in zip([watch, *streams], [inputs, inputs + 1], strict=False):
                with collector.attached():
                    block(given)
        for collector in [watch, *streams]:
            collector.finish()
            for group in collector.groups:
                parts += [[linear.local for linear in group.linears], group.tokens, group.hessian]
                parts += [group.drift] if group.drift is not None else []
    return digest(*parts)


# -- measuring


def measured(name: str) -> str:
    from quantize.measuring.quality import _Figures

    figures = _Figures()
    for batch in range(4):
        logits = integers(batch, 33, 50, most=40) / 8
        changed = logits + integers(20 + batch, 33, 50, most=2) / 8
        successors = torch.from_numpy(np.arange(33) * 5 % 50)[:, None]
        figures.add(logits.log_softmax(-1), changed.log_softmax(-1), successors)
    values = figures.quality(name).as_data()
    return digest({key: f"{value:.5g}" for key, value in values.items() if key != "branch"})


# -- GGUF


def made_level(level: str) -> str:
    """A level of nine small tensors, with the importance matrix given, as llama.cpp writes it on one thread."""
    import gguf

    from quantize.gguf.quantize import finish, request, start

    dice = np.random.Generator(np.random.PCG64(0))
    with tempfile.TemporaryDirectory() as folder:
        source, target, vectors = (Path(folder) / name for name in ("source.gguf", "target.gguf", "imatrix.npz"))
        writer = gguf.GGUFWriter(source, "llama")
        for add, value in (
            (writer.add_context_length, 64), (writer.add_embedding_length, 256), (writer.add_block_count, 1),
            (writer.add_feed_forward_length, 256), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
            (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_file_type, 0),
        ):  # fmt: skip
            add(value)
        importance = {}
        for name in ("token_embd", "output", *(f"blk.0.{name}" for name in
                     ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))):  # fmt: skip
            weight = dice.integers(-1000, 1001, (8, 256)) * dice.integers(1, 9, (8, 256)) / 8192
            writer.add_tensor(f"{name}.weight", weight.astype(np.float32))
            importance[f"{name}.weight"] = (dice.integers(1, 100, 256) / 8).astype(np.float32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        np.savez(vectors, **importance)
        given = None if level in {"F32", "F16", "BF16"} else vectors
        with start(request(level, source, target, threads=1, imatrix=given)) as child:
            code, log = finish(child)
        assert code == 0, log
        return hashlib.sha256(target.read_bytes()).hexdigest()[:16]


PARTS: dict[str, tuple[int | str, Part, list[str]]] = {
    "SOLVER_VERSION of quantize/planning/keys.py": (SOLVER_VERSION, solved, SOLVES),
    "SAMPLER_VERSION of quantize/calibration/tokens.py": (SAMPLER_VERSION, sampled, ["one text", "two texts"]),
    "STATISTICS_VERSION of quantize/planning/keys.py": (STATISTICS_VERSION, gathered, ["shared inputs", "drift"]),
    "VERSION of quantize/measuring/__init__.py": (MEASURE_VERSION, measured, ["figures"]),
    "LEVELS_VERSION of quantize/planning/levels.py": (
        f"{LEVELS_VERSION}, llama-cpp-python {LLAMA_VERSION}", made_level, list(LEVELS),
    ),
}  # fmt: skip
"""By the version that pins them: its number, what computes a hash, and the names of the hashes."""


SLOW_LEVELS = {"IQ1_M", "IQ2_M", "IQ3_XXS"}
"""Seconds each, spent on tables of grids that IQ1_S, IQ2_S and IQ3_S, which always run, make or do without."""


def cases() -> Iterator[Any]:
    for part, (_, compute, names) in PARTS.items():
        for name in names:
            marks = [*needs.LLAMA_CPP] if compute is made_level else []
            marks += [pytest.mark.full] if name in SLOW_LEVELS else []
            yield pytest.param(part, name, id=name, marks=marks)


def pinned() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(("part", "name"), list(cases()))
def test_bytes_change_with_their_version_only(part: str, name: str) -> None:
    number, compute, _ = PARTS[part]
    known = pinned()[part]
    assert known["version"] == number, (
        f"{part} is {number}, but golden.json holds hashes of {known['version']}: renew them with "
        "'python tests/test_golden.py', and look at what changed"
    )
    assert compute(name) == known["hashes"].get(name), (
        f"'{name}' comes out in other bytes: raise {part}, or finished work of users is taken for what it is not; then "
        "renew the hashes with 'python tests/test_golden.py'"
    )


def test_every_pinned_hash_is_of_a_case() -> None:
    assert {part: set(entry["hashes"]) for part, entry in pinned().items()} == {
        part: set(names) for part, (_, _, names) in PARTS.items()
    }


def renew() -> None:
    """Write the hashes of every version that was raised, or that is new."""
    known = pinned() if TABLE.is_file() else {}
    for part, (number, compute, names) in PARTS.items():
        entry = known.get(part, {"version": None, "hashes": {}})
        if entry["version"] == number and set(entry["hashes"]) >= set(names):
            print(f"{part}: still {number}, left as it is")
            continue
        print(f"{part}: {entry['version']} -> {number}, {len(names)} hashes")
        old = entry["hashes"] if entry["version"] == number else {}
        known[part] = {"version": number, "hashes": {name: old.get(name) or compute(name) for name in names}}
    TABLE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(TABLE.parent.parent))
    renew()
