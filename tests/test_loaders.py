"""What we write is what transformers with optimum and gptqmodel reads, on a CPU: logits of every grid cell."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_model, write_recipe
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.pytorch_utils import Conv1D

import quantize
from quantize.formats.reader import BranchReader

_MISSING = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
pytestmark = [
    pytest.mark.loader,
    pytest.mark.skipif(bool(_MISSING), reason=f"the extra `loaders` is not installed: no {', '.join(_MISSING)}"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
DESC_ACT: tuple[Any, ...] = (False, True, "static")
SYM = (True, False)
Cell = tuple[Any, ...]
CELLS: list[Cell] = list(itertools.product(BITS, GROUP_SIZES, DESC_ACT, SYM))
PAIRS: list[Cell] = [
    (bits, group_size, DESC_ACT[(row + column) % 3], SYM[(row + column) % 2])
    for row, bits in enumerate(BITS)
    for column, group_size in enumerate(GROUP_SIZES)
]
"""Cells in which any two values of two parameters meet; the others are for a run of the full product."""

AWQ_CELLS: list[Cell] = list(itertools.product((32, 64, 128, -1), (True, False), ("gptq", "nearest")))
AWQ_PAIRS: list[Cell] = [AWQ_CELLS[place] for place in (0, 3, 5, 6, 8, 11, 13, 14)]

# Left out, because transformers 5.23 with optimum 2.3 and gptqmodel 7.6 cannot load them, whoever wrote them:
# falcon (its linears are a subclass of nn.Linear, which optimum does not replace, so the model comes up with random
# weights) and gpt2 (its output head is tied, and its _init_weights asks for the `weight` of a packed module).
ARCHITECTURES = (
    "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt", "stablelm", "smollm3", "olmo2",
)  # fmt: skip

# The loader computes in float16, the yardstick in float32. The kernel that gptqmodel picks for 4 bits on a CPU rounds
# inputs and scales to bfloat16 (2^-9 each, through up to three blocks): 1.4 % of the largest logit was seen.
TOLERANCE = {2: 0.01, 3: 0.01, 4: 0.03, 8: 0.01}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _quick_loader() -> Iterator[None]:
    """Two threads; no compiling of kernels for a handful of tokens; no walk over all objects at every load."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        patch.setenv("GPTQMODEL_CPU_WORKERS", "2")
        gc.freeze()
        yield
        gc.unfreeze()


def cells(every: Sequence[Cell], chosen: Sequence[Cell], name: Callable[[Cell], str]) -> list[Any]:
    """Parameters of a test: all cells, those that are not chosen marked ``full``."""
    marks = {cell: () if cell in chosen else pytest.mark.full for cell in every}
    return [pytest.param(cell, marks=marks[cell], id=name(cell)) for cell in every]


def branch_of(cell: Cell) -> str:
    bits, group_size, desc_act, sym = cell
    return f"b{bits}-g{group_size}-{desc_act}-{'sym' if sym else 'asym'}"


def build(folder: Path, architecture: str, body: str, **changes: Any) -> tuple[Path, Path]:
    """The folder of a tiny source, and the folder that its branches lie in."""
    source = write_model(folder / "tiny", architecture, **changes)
    recipe = quantize.load_recipe(write_recipe(folder / "recipe.yaml", source, body))
    quantize.build(recipe, quantize.BuildOptions(dist=folder / "dist", device="cpu"))
    return source, folder / "dist" / "tiny-GPTQ"


@pytest.fixture(scope="module")
def grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    lines = [
        f"    - {{branch: {branch_of(cell)}, bits: {cell[0]}, group_size: {cell[1]}, "
        f"desc_act: {str(cell[2]).lower()}, sym: {str(cell[3]).lower()}}}\n"
        for cell in (CELLS if request.config.getoption("--full") else PAIRS)
    ]
    return build(tmp_path_factory.mktemp("grid"), "llama", "  variants:\n" + "".join(lines), num_hidden_layers=1)


def token_ids() -> torch.Tensor:
    return torch.randint(3, 380, (1, 16), generator=torch.Generator().manual_seed(1))


def our_model(source: Path, branch: Path) -> torch.nn.Module:
    """The source model in float32, carrying the tensors that our own reader finds in a branch."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = load_file(branch / "model.safetensors")
    reader = BranchReader(branch)
    decoded = 0
    for name, module in model.named_modules():
        if f"{name}.qweight" in tensors:
            weight = reader.weight(name)
            module.weight.data = weight.t() if isinstance(module, Conv1D) else weight
            decoded += 1
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data.copy_(tensors[name])
    for name, scales in tensors.items():
        if name.endswith(".act.scales"):  # what the loader divides an activation's output by
            activation = model.get_submodule(name.removesuffix(".scales"))
            activation.register_forward_hook(lambda module, inputs, output, scales=scales: output / scales.float())
    assert decoded == sum(name.endswith(".qweight") for name in tensors)
    return model.eval()


def check_loaded(source: Path, branch: Path, bits: int = 4, backend: str | None = None) -> None:
    """The branch as transformers loads it: quantized modules, our logits, and it generates."""
    wish = {"quantization_config": GPTQConfig(bits=bits, backend=backend)} if backend else {}
    loaded = AutoModelForCausalLM.from_pretrained(branch, dtype=torch.float16, device_map="cpu", **wish)
    packed = [name for name, _ in loaded.named_buffers() if name.endswith("qweight")]
    assert packed, "loaded, but not as a quantized model"
    ids = token_ids()
    with torch.no_grad():
        theirs = loaded(ids).logits.float()
        ours = our_model(source, branch)(ids).logits
    assert float((theirs - ours).abs().max()) < TOLERANCE[bits] * float(ours.abs().max())
    written = loaded.generate(ids[:1, :4], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert written.shape == (1, 6)


@pytest.mark.parametrize(("every", "chosen"), [(CELLS, PAIRS), (AWQ_CELLS, AWQ_PAIRS)], ids=["gptq", "awq"])
def test_any_two_values_meet_in_a_chosen_cell(every: list[Cell], chosen: list[Cell]) -> None:
    for one, other in itertools.combinations(range(len(every[0])), 2):
        assert {(cell[one], cell[other]) for cell in chosen} == {(cell[one], cell[other]) for cell in every}
    assert set(chosen) < set(every)


@pytest.mark.parametrize("cell", cells(CELLS, PAIRS, branch_of))
def test_every_cell_of_the_grid_loads_with_our_logits(grid: tuple[Path, Path], cell: Cell) -> None:
    source, branches = grid
    bits, group_size, _, sym = cell
    # the kernel that gptqmodel 7.6 picks here on a CPU (TorchFusedLinear) forgets the zero points
    backend = "torch" if (bits, group_size, sym) == (4, -1, False) else None
    check_loaded(source, branches / branch_of(cell), bits, backend)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of another architecture, and its GPTQ branches; those of AWQ lie beside them."""
    body = "  variants: [{group_size: 32}]\nawq: {variants: [{group_size: 32}]}\n"
    return build(tmp_path_factory.mktemp(request.param), request.param, body)


def test_other_architectures_load_with_our_logits(other: tuple[Path, Path]) -> None:
    source, branches = other
    check_loaded(source, branches / "main")


def test_awq_of_other_architectures_loads_with_our_logits(other: tuple[Path, Path]) -> None:
    source, branches = other
    check_loaded(source, branches.with_name("tiny-AWQ") / "main")


@pytest.mark.parametrize("sym", [True, False])
def test_checkpoint_format_v2_loads_with_our_logits(tmp_path: Path, sym: bool) -> None:
    body = f"  checkpoint_format: gptq_v2\n  variants: [{{bits: 4, group_size: 32, sym: {str(sym).lower()}}}]\n"
    source, branches = build(tmp_path, "llama", body)
    check_loaded(source, branches / "main")


def test_written_zero_biases_load_with_our_logits(tmp_path: Path) -> None:
    body = "  zero_bias: true\n  variants: [{bits: 4, group_size: 32}]\n"
    source, branches = build(tmp_path, "llama", body)
    check_loaded(source, branches / "main")


@pytest.fixture(scope="module")
def awq_grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    lines = [
        f"    - {{branch: {awq_branch(cell)}, group_size: {cell[0]}, zero_point: {str(cell[1]).lower()}, "
        f"rounding: {cell[2]}}}\n"
        for cell in (AWQ_CELLS if request.config.getoption("--full") else AWQ_PAIRS)
    ]
    body = "  variants: [{group_size: 32}]\nawq:\n  variants:\n" + "".join(lines)
    source, branches = build(tmp_path_factory.mktemp("awq"), "llama", body)
    return source, branches.with_name("tiny-AWQ")


def awq_branch(cell: Cell) -> str:
    return f"g{cell[0]}-{'zero' if cell[1] else 'middle'}-{cell[2]}"


@pytest.mark.parametrize("cell", cells(AWQ_CELLS, AWQ_PAIRS, awq_branch))
def test_every_awq_cell_loads_with_our_logits(awq_grid: tuple[Path, Path], cell: Cell) -> None:
    source, branches = awq_grid
    check_loaded(source, branches / awq_branch(cell))


def test_the_tolerance_tells_a_wrong_zero_point(grid: tuple[Path, Path]) -> None:
    source, branches = grid
    branch = branches / branch_of((4, 32, False, False))
    ids = token_ids()
    with torch.no_grad():
        right = our_model(source, branch)(ids).logits
        wrong_model = our_model(source, branch)
        layer = wrong_model.get_submodule("model.layers.0.mlp.down_proj")
        tensors = load_file(branch / "model.safetensors")
        step = tensors["model.layers.0.mlp.down_proj.scales"].float().t().repeat_interleave(32, dim=1)
        layer.weight += step
        wrong = wrong_model(ids).logits
    assert float((wrong - right).abs().max()) > TOLERANCE[4] * float(right.abs().max())
