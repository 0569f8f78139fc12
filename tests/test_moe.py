"""Mixtures of experts: each expert's linears quantized from the tokens that it gets, under the checkpoint's names."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from safetensors.torch import load_file, save_file
from tiny import MIXTURES, write_model, write_recipe
from transformers import AutoModelForCausalLM

import quantize
from quantize.calibration.folding import find_folds
from quantize.calibration.forward import Activations, block_statistics
from quantize.calibration.statistics import InputStatistics
from quantize.errors import SolveError
from quantize.formats.reader import BranchReader
from quantize.methods.gptq import GptqParameters, round_to_nearest, solve
from quantize.recipe.schema import Model
from quantize.source import resolve
from quantize.source.streamed import StreamedModel
from quantize.verifying.forward import logits_of
from quantize.verifying.tensors import check_tensors

SILENT = (4, 5)
"""The experts to which :func:`silence` has no token sent."""
BODY = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: own, bits: 3, group_size: 32, propagate: quantized}
awq:
  variants: [{group_size: 32}]
"""
ONE = "  variants: [{group_size: 32}]\n"
SETTINGS = {"samples": 4, "compute_dtype": "float32"}


def silence(folder: Path) -> Path:
    """Set the routers so that, of six, the first two experts share all tokens, the next two do, and the last get none.

    Whatever x is, one of x·v and x·-v is positive, and so is one of x·u and x·-u: zero is never among the two largest.
    """
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".gate.weight"):
            first, second = tensor[0].clone(), tensor[1].clone()
            tensor[:] = torch.stack([first, -first, second, -second, 0 * first, 0 * first])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def streamed(folder: Path) -> StreamedModel:
    source = resolve(Model(source=str(folder)), weights=True)
    return StreamedModel(source, torch.float32, torch.device("cpu"), head=True)


def token_ids(rows: int = 5, length: int = 48) -> torch.Tensor:
    return torch.randint(3, 380, (rows, length), generator=torch.Generator().manual_seed(3))


def roll(model: StreamedModel, ids: torch.Tensor, batch: int) -> tuple[Activations, list[list[InputStatistics]]]:
    """Activations after the last block, and every block's statistics."""
    activations, statistics = Activations(model, ids.numpy(), batch), []
    for index in range(len(model)):
        with model.block(index) as block:
            statistics.append(block_statistics(index, block, activations)[0])
    return activations, statistics


@dataclass
class Routed:
    """What a mixture of a plain transformers model was handed: inputs [tokens, width], experts [tokens, k]."""

    experts: Any
    inputs: torch.Tensor
    chosen: torch.Tensor

    def rows(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the expert's first linears read, and its last one, from the stacked parameters."""
        inputs = self.inputs[(self.chosen == expert).any(dim=1)]
        gate, up = (inputs @ self.experts.gate_up_proj[expert].t()).chunk(2, dim=1)
        return inputs, torch.nn.functional.silu(gate) * up


def routed(folder: Path, ids: torch.Tensor) -> list[Routed]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found: list[Routed] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, given: found.append(Routed(module, given[0].clone(), given[1].clone()))
        )
    with torch.no_grad():
        model(ids)
    return found


def near(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((left - right).norm()) <= tolerance * float(right.norm())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_streamed_logits_equal_plain_transformers(tmp_path: Path, architecture: str, implementation: str) -> None:
    folder, ids = write_model(tmp_path / "tiny", architecture), token_ids()
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation=implementation
    )
    with torch.no_grad():
        expected = plain.eval()(ids).logits
    for batch in (5, 2):
        activations, _ = roll(streamed(folder), ids, batch)
        found = activations.model.logits(ids, activations.hidden)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_statistics_of_an_expert_are_those_of_its_tokens(tmp_path: Path, architecture: str) -> None:
    folder, ids = write_model(tmp_path / "tiny", architecture), token_ids()
    mixtures = routed(folder, ids)
    for batch in (5, 2):
        _, statistics = roll(streamed(folder), ids, batch)
        for groups, mixture in zip(statistics, mixtures, strict=True):
            of_experts = [group for group in groups if group.linears[0].expert is not None]
            assert len(of_experts) == 2 * 6
            for place, group in enumerate(of_experts):
                rows = mixture.rows(place // 2)[place % 2]
                assert len(group.linears) == 2 - place % 2  # gate and up share one input, down has its own
                assert all(f".experts.{place // 2}." in linear.local for linear in group.linears)
                assert group.tokens == len(rows) > 0
                assert near(group.hessian, rows.t() @ rows)


def test_an_expert_that_later_batches_reach_is_found_then(tmp_path: Path) -> None:
    folder = silence(write_model(tmp_path / "tiny", "qwen3_moe"))
    ids = token_ids(rows=40, length=1)
    _, one_by_one = roll(streamed(folder), ids, batch=1)
    _, at_once = roll(streamed(folder), ids, batch=40)
    for left, right in zip(one_by_one, at_once, strict=True):
        names = [[linear.local for linear in group.linears] for group in right]
        assert [[linear.local for linear in group.linears] for group in left] == names
        for group, expected in zip(left, right, strict=True):
            assert group.tokens == expected.tokens
            assert near(group.hessian, expected.hessian, 1e-4)


def test_drift_is_of_the_tokens_that_both_models_send_to_an_expert(tmp_path: Path) -> None:
    folder, ids = write_model(tmp_path / "tiny", "qwen3_moe"), token_ids()
    model = streamed(folder)
    source = Activations(model, ids.numpy(), 5)
    stream = source.copy()
    stream.hidden += 0.3 * source.hidden.std() * torch.randn(stream.hidden.shape, generator=torch.manual_seed(0))
    both = []
    for activations in (source, stream):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        with model.block(0) as block:
            hook = block.mlp.experts.register_forward_pre_hook(
                lambda module, given, seen=seen: seen.append((given[0].clone(), given[1].clone()))
            )
            activations.run(0, block, slice(0, 5))
            hook.remove()
        both.append(seen[0])
    (inputs, chosen), (drifted, chosen_there) = both
    assert not torch.equal(chosen.sort(dim=1).values, chosen_there.sort(dim=1).values)
    with model.block(0) as block:
        _, (groups,) = block_statistics(0, block, source, streams=[stream], gather=False)
    firsts = [group for group in groups if group.linears[0].local.endswith("gate_proj")]
    for expert, group in enumerate(firsts):
        here, there = (chosen_there == expert).any(dim=1), (chosen == expert).any(dim=1)
        rows, shared = drifted[here], here & there
        assert group.tokens == len(rows) > int(shared.sum()) > 0
        assert near(group.hessian, rows.t() @ rows)
        assert group.drift is not None
        assert near(group.drift, (inputs[shared] - drifted[shared]).t() @ drifted[shared], 1e-4)


@dataclass
class Built:
    architecture: str
    source: Path
    result: quantize.building.BuildResult
    recipe: Path

    def folder(self, label: str) -> Path:
        return next(item.folder for item in self.result.plan.variants if item.label == label)

    def ledger(self, label: str) -> dict[str, dict[str, Any]]:
        data = json.loads((self.folder(label) / "quantize-manifest.json").read_text())
        return {row["module"]: row for row in data["ledger"]}


@pytest.fixture(scope="module")
def built_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Three branches of a mixture of that architecture whose last two experts get no token."""

    @functools.cache
    def build(architecture: str) -> Built:
        folder = tmp_path_factory.mktemp(architecture)
        source = silence(write_model(folder / "tiny", architecture, num_hidden_layers=2))
        recipe = write_recipe(folder / "recipe.yaml", source, BODY, **SETTINGS)
        result = quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=folder / "dist", device="cpu"))
        return Built(architecture, source, result, recipe)

    return build


@pytest.fixture(scope="module", params=MIXTURES)
def built(request: pytest.FixtureRequest, built_of: Callable[[str], Built]) -> Built:
    return built_of(request.param)


def is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".shared_expert_gate.weight"))


LABELS = ("gptq/main", "gptq/own", "awq/main")


@pytest.mark.parametrize("label", LABELS)
def test_experts_are_packed_under_their_names_and_routers_stay(built: Built, label: str) -> None:
    source = load_file(built.source / "model.safetensors")
    tensors = load_file(built.folder(label) / "model.safetensors")
    packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    matrices = [name for name, tensor in source.items() if tensor.dim() == 2 and ".layers." in name]
    assert packed == {name.removesuffix(".weight") for name in matrices if not is_router(name)}
    assert sum(".experts." in name for name in packed) == 2 * 6 * 3
    routers = [name for name in matrices if is_router(name)]
    assert len(routers) == 2 * (2 if built.architecture == "qwen2_moe" else 1)
    assert all(torch.equal(tensors[name], source[name]) for name in routers)
    planned = next(item.nbytes for item in built.result.plan.variants if item.label == label)
    assert planned == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert check_tensors(built.folder(label), built.result.plan.source).outcome == "ok"


def test_configs_say_what_is_not_quantized(built: Built) -> None:
    config = json.loads((built.folder("gptq/main") / "config.json").read_text())["quantization_config"]
    names = [name for name in load_file(built.source / "model.safetensors") if name.endswith(".weight")]
    ((*ends,),) = config["modules_in_block_to_quantize"]
    linears = [name.removesuffix(".weight") for name in names if "_proj" in name or ".experts." in name]
    routers = [name.removesuffix(".weight") for name in names if is_router(name)]
    assert all(any(name.endswith(end) for end in ends) for name in linears)  # as optimum asks
    assert not any(end in name for name in routers for end in ends)  # as vLLM asks
    left = json.loads((built.folder("awq/main") / "config.json").read_text())["quantization_config"]
    assert sorted(left["modules_to_not_convert"]) == sorted(routers)
    assert not any(part in name for name in linears for part in left["modules_to_not_convert"])


@pytest.mark.parametrize("label", LABELS)
def test_experts_that_no_token_reached_are_rounded_to_nearest_and_recorded(built: Built, label: str) -> None:
    source, reader = load_file(built.source / "model.safetensors"), BranchReader(built.folder(label))
    silent = {
        module: row
        for module, row in built.ledger(label).items()
        if any(f".experts.{number}." in module for number in SILENT)
    }
    assert len(silent) == 2 * len(SILENT) * 3
    for module, row in silent.items():
        weight = source[f"{module}.weight"].float()
        assert (row["outcome"], row["tokens"], row["dead_columns"]) == ("starved_expert", 0, 0)
        sym, bits = label != "awq/main", 3 if label == "gptq/own" else 4
        asked, alike = GptqParameters(bits, 32, sym=sym), torch.eye(weight.shape[1])
        (expected,), nearest = solve(weight, alike, [asked]), round_to_nearest(weight, alike, asked)
        differing = (reader.weight(module) - expected.dequantize()).abs() > 1e-6
        assert float(differing.float().mean()) < 0.01  # where two ranges of a group are equally good
        apart, baseline = reader.weight(module) - weight, nearest.dequantize() - weight
        assert float(apart.square().sum()) <= float(baseline.square().sum())
    assert set(silent) <= set(built.result.oddities[label]["starved_expert"])


@pytest.mark.parametrize("label", LABELS)
def test_a_branch_answers_nearly_as_its_source(built: Built, label: str) -> None:
    ids = token_ids(1)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(built.source, dtype=torch.float32).eval()
        expected = plain(ids).logits[0].log_softmax(-1)
    found = logits_of(built.folder(label), ids[0].tolist()).log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert 0 < divergence < (0.1 if label == "gptq/own" else 0.02)


def test_awq_scales_an_experts_last_linear_and_says_of_the_others_that_it_does_not(built: Built) -> None:
    up = "w3" if built.architecture == "mixtral" else "up_proj"
    last = "w2" if built.architecture == "mixtral" else "down_proj"
    for module, row in built.ledger("awq/main").items():
        if ".experts." in module and row["tokens"]:
            owner, _, leaf = module.rpartition(".")
            assert row.get("scale_folded_into") == (f"{owner}.{up}" if leaf == last else None)
            assert leaf == last or row["outcome"] in ("unscaled", "starved_expert")


def test_folds_of_experts_are_found_whatever_the_trial_tokens_reach(tmp_path: Path) -> None:
    model, ids = streamed(silence(write_model(tmp_path / "tiny", "qwen2_moe"))), token_ids(1, 4)
    activations = Activations(model, ids.numpy(), 1)
    with model.block(0) as block:
        before = {name: tensor.clone() for name, tensor in block.named_parameters()}
        entered = activations.first()
        (groups, _) = block_statistics(0, block, activations)
        folds = find_folds(model, 0, block, groups, hidden=entered)
        assert all(torch.equal(before[name], tensor) for name, tensor in block.named_parameters())
    producers = {leader: fold.producer if fold else None for leader, fold in folds.items()}
    for number in range(6):
        assert producers[f"mlp.experts.{number}.gate_proj"] is None
        assert producers[f"mlp.experts.{number}.down_proj"] == f"mlp.experts.{number}.up_proj"
    assert producers["mlp.shared_expert.gate_proj"] is None  # its norm feeds the router too
    assert producers["mlp.shared_expert.down_proj"] == "mlp.shared_expert.up_proj"
    assert producers["self_attn.o_proj"] == "self_attn.v_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, whose last two experts get no token."""
    folder = tmp_path_factory.mktemp("mixture") / "tiny"
    return silence(write_model(folder, "qwen3_moe", num_hidden_layers=1))


@pytest.mark.parametrize(("fewest", "starved"), [("0", 6), ("100000", 18), ("in_features", None)])
def test_min_expert_tokens_decides_what_is_starved(
    mixture: Path, tmp_path: Path, fewest: str, starved: int | None
) -> None:
    body = "  min_expert_tokens: {}\n"
    recipe = write_recipe(tmp_path / "r.yaml", mixture, body.format(fewest) + ONE, **SETTINGS)
    result = quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    (item,) = result.plan.variants
    ledger = json.loads((item.folder / "quantize-manifest.json").read_text())["ledger"]
    inputs = {linear.name: linear.in_features for linear in result.plan.table.linears}
    if starved is None:
        starved = sum(".experts." in row["module"] and row["tokens"] < inputs[row["module"]] for row in ledger)
    assert len(result.oddities[item.label]["starved_expert"]) == starved
    again = write_recipe(tmp_path / "r.yaml", mixture, body.format(7) + ONE, **SETTINGS)
    (item,) = quantize.plan(quantize.load_recipe(again), quantize.PlanOptions(dist=tmp_path / "dist")).variants
    assert item.state == "fresh"  # it changes no weight


@pytest.mark.parametrize("section", ["gptq", "awq"])
def test_a_starved_expert_fails_where_the_recipe_says_so(mixture: Path, tmp_path: Path, section: str) -> None:
    body = ONE + ("awq:\n" + ONE if section == "awq" else "")
    recipe = write_recipe(tmp_path / "r.yaml", mixture, body + "  fail_on: [starved_expert]\n", **SETTINGS)
    with pytest.raises(SolveError, match=rf"experts\.\d\.\w+: starved_expert \(\d+ tokens\), which {section}\.fail_on"):
        quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    assert not list((tmp_path / "dist").glob("tiny-*/*"))


def test_build_status_and_measure_speak_of_experts(mixture: Path, tmp_path: Path, invoke: Command) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        mixture,
        ONE + "measure: {samples: 2, sequence_length: 64}\n",
        **SETTINGS,
    )
    done = invoke("build", recipe, "--dist", tmp_path / "dist", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "starved_expert in model.layers.0.mlp.experts." in done.stdout
    assert " starved_expert" in invoke("status", recipe, "--dist", tmp_path / "dist").stdout
    done = invoke("measure", recipe, "--dist", tmp_path / "dist", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in json.loads(done.stdout)["branches"] if row["branch"] == "gptq/main"]
    assert 0 < row["kl_divergence"] < 0.05


@pytest.mark.parametrize("value", ["-1", "true", "many"])
def test_a_bad_min_expert_tokens_is_one_sentence(
    mixture: Path, tmp_path: Path, invoke: Command, value: str
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", mixture, f"  min_expert_tokens: {value}\n{ONE}")
    done = invoke("validate", recipe)
    assert done.returncode == 2
    assert "must be a number of tokens, or in_features" in done.stderr
    assert "min_expert_tokens" in done.stderr


def test_half_stacked_experts_are_refused(mixture: Path, tmp_path: Path, invoke: Command) -> None:
    folder = tmp_path / "stacked"
    folder.mkdir()
    for file in mixture.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(mixture / "model.safetensors")
    owner = "model.layers.0.mlp.experts"
    tensors[f"{owner}.down_proj"] = torch.stack([tensors.pop(f"{owner}.{n}.down_proj.weight") for n in range(6)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = invoke("plan", write_recipe(tmp_path / "r.yaml", folder, ONE))
    assert done.returncode == 2
    assert f"the checkpoint lacks the tensor {owner}" in done.stderr


# -- loaders. transformers stacks the experts before optimum or gptqmodel replaces linears, and then finds none; so it
# is gptqmodel's own loader that reads such branches. It knows Mixtral's experts by other names than its authors':
# version 7.6 asks for mlp.experts.0.gate_proj where the checkpoint has block_sparse_moe.experts.0.w1.


@pytest.mark.loader
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="the extra `loaders` is not installed: no gptqmodel")
def test_gptqmodel_loads_branches_with_our_logits(built_of: Callable[[str], Built], tmp_path: Path) -> None:
    """All architectures in one process: it takes longer to start than to load them."""
    ids = token_ids(1, 16)
    np.save(tmp_path / "ids.npy", ids.numpy())
    loader = Path(__file__).with_name("experts_loader.py")
    models = [built_of(architecture) for architecture in MIXTURES if architecture != "mixtral"]
    branches = [(one, label) for one in models for label in LABELS]
    done = subprocess.run(
        [sys.executable, str(loader), str(tmp_path / "ids.npy"), str(tmp_path),
         *(str(one.folder(label)) for one, label in branches)],
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [len(one.ledger(label)) for one, label in branches]
    for number, (one, label) in enumerate(branches):
        ours = logits_of(one.folder(label), ids[0].tolist())
        theirs = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        # it computes in 16 bits, in which a close choice of the router turns: that token and those after it then differ
        told = f"{one.architecture} {label}"
        assert float((theirs - ours)[0].abs().max()) < 0.03 * float(ours.abs().max()), told
        assert float(torch.cosine_similarity(theirs, ours, dim=-1).mean()) > 0.98, told
