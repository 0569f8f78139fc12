"""GGUF levels with error feedback: llama.cpp's files in everything but the payload of solved tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import torch
from conftest import Command
from outcome import assert_refused
from reporting import Remembering
from tiny import SMALL, small_wide_model, wide_model

import quantize
from quantize.building import error_feedback
from quantize.errors import DamagedBuild, SolveError
from quantize.executors import blocks
from quantize.executors.blocks import BlockJob, BlockRows, solve_block_job
from quantize.formats.ggml_blocks import BLOCK_TYPES, Blocks, decode, encode, row_bytes

KINDS = sorted(BLOCK_TYPES)
LEVELS = ("Q4_K_M", "Q2_K", "IQ2_XS", "F16")
RECIPE = (
    SMALL
    + """\
calibration: {{dataset: pydoc, samples: 4, sequence_length: 64, compute_dtype: float32}}
gguf: {{levels: [{levels}], solve: {solve}{more}}}
"""
)
SOLVED = [f"blk.{block}.{name}.weight" for block in (0, 1) for name in (
    "attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up",
)]  # fmt: skip


# -- blocks


def random_bytes(kind: str, rows: int = 16, columns: int = 512) -> np.ndarray:
    generator = np.random.default_rng(3)
    return generator.integers(0, 256, (rows, row_bytes(kind, columns)), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_blocks_are_what_the_gguf_package_reads_and_come_back_bit_for_bit(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    layout, data = BLOCK_TYPES[kind], random_bytes(kind)
    number = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (layout.size, layout.nbytes)
    taken_apart = decode(data, kind)
    np.testing.assert_array_equal(taken_apart.values(), gguf.quants.dequantize(data, number))
    assert np.array_equal(encode(taken_apart), data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q6_K", "IQ4_XS", "Q2_K"])
def test_what_a_type_cannot_hold_is_refused(kind: str) -> None:
    layout = BLOCK_TYPES[kind]
    one = decode(random_bytes(kind), kind)
    over = one.codes.copy()
    over[0, 0] = layout.highest + 1
    with pytest.raises(ValueError, match="code is outside"):
        encode(Blocks(kind, over, one.d, one.scales, one.dmin, one.minima))
    if layout.has_scales:
        over = one.scales.copy()
        over[0, 0] = layout.lowest_scale - 1
        with pytest.raises(ValueError, match="scale is outside"):
            encode(Blocks(kind, one.codes, one.d, over, one.dmin, one.minima))
    with pytest.raises(ValueError, match="whole blocks"):
        row_bytes(kind, layout.size + 8)
    with pytest.raises(ValueError, match="whole blocks"):
        decode(np.zeros((1, layout.nbytes + 1), np.uint8), kind)


# -- the solve


def problem(kind: str, rows: int = 32, columns: int = 512) -> BlockJob:
    """Correlated inputs, a weight, and coarse scales to start from; some groups are flat, one row is all zero."""
    torch.manual_seed(1)
    weight = torch.randn(rows, columns) * 0.05
    weight[3] = 0
    inputs = torch.randn(900, columns) @ (torch.eye(columns) + 0.4 * torch.randn(columns, columns) / columns**0.5)
    layout = BLOCK_TYPES[kind]
    levels = np.array(layout.codebook if layout.codebook else range(layout.lowest, layout.highest + 1))
    groups = layout.size // layout.group
    largest = weight.view(rows, -1, layout.group).abs().amax(2).numpy()
    with_offset = layout.dmin is not None
    top = float(np.abs(levels).max()) / (2 if with_offset else 1)
    whole = max(1, layout.highest_scale // 2)
    d = (largest.reshape(rows, -1, groups).max(2) / top / whole).astype(np.float16)
    scales = np.full(largest.shape, whole, dtype=np.int16)
    if layout.has_scales:
        scales[5, 1] = 0
    step = np.repeat(np.repeat(d.astype(np.float32), groups, 1) * scales, layout.group, 1)
    dmin = d if with_offset else None
    minima = None
    if with_offset:
        minima = np.full(largest.shape, min(layout.highest_scale, int(top)) if layout.has_scales else 1, np.int16)
        if not layout.has_scales:
            dmin = (d.astype(np.float32) * top).astype(np.float16)
    offset = 0 if dmin is None else np.repeat(np.repeat(dmin.astype(np.float32), groups, 1) * minima, layout.group, 1)
    position = (weight.numpy() + offset) / np.where(step == 0, 1, step)
    codes = np.abs(position[..., None] - levels).argmin(-1) + (0 if layout.codebook else layout.lowest)
    first = encode(Blocks(kind, codes.astype(np.int16), d, scales, dmin, minima))
    return BlockJob(inputs.t() @ inputs, [BlockRows(kind, lambda: weight, first)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_solve_never_makes_a_row_worse_and_says_its_error_truly(kind: str) -> None:
    job = problem(kind)
    (part,), (solved,) = job.parts, solve_block_job(job)
    weight, hessian = part.weight().double(), job.hessian.double()
    for data, said in ((part.first, solved.before), (solved.data, solved.after)):
        rest = weight - torch.from_numpy(decode(data, kind).values()).double()
        torch.testing.assert_close(((rest @ hessian) * rest).sum(1), said, rtol=1e-3, atol=1e-7)
    assert bool((solved.after <= solved.before * 1.02).all())
    assert float(solved.after.sum()) < 0.6 * float(solved.before.sum())
    (again,) = solve_block_job(problem(kind))
    assert np.array_equal(solved.data, again.data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    job = problem("Q4_K")
    job.hessian[1, 1] = value
    with pytest.raises(SolveError, match="not finite"):
        solve_block_job(job)


def test_a_hessian_of_few_tokens_is_damped() -> None:
    job = problem("Q4_0")
    rows = torch.randn(3, 512)
    (solved,) = solve_block_job(BlockJob(rows.t() @ rows, job.parts))
    assert float(solved.after.sum()) < float(solved.before.sum())


# -- levels


def write(
    path: Path, source: Path, solve: str = "error_feedback", levels: tuple[str, ...] = LEVELS, more: str = ""
) -> Path:
    path.write_text(RECIPE.format(source=source, solve=solve, levels=", ".join(levels), more=more))
    return path


class Built:
    def __init__(self, recipe: Path, dist: Path, **options: Any) -> None:
        told = Remembering()
        settings = quantize.BuildOptions(dist=dist, device="cpu", **options)
        self.result = quantize.build(quantize.load_recipe(recipe), settings, told)
        self.lines, self.dist = told.lines, dist
        assert self.result.plan.gguf
        self.folder = self.result.plan.gguf.folder
        self.manifest = json.loads((self.folder / "quantize-manifest.json").read_text())

    def bytes_of(self, level: str) -> bytes:
        return (self.folder / f"small-{level}.gguf").read_bytes()

    def tensors(self, level: str) -> dict[str, Any]:
        from gguf import GGUFReader

        return {tensor.name: tensor for tensor in GGUFReader(self.folder / f"small-{level}.gguf").tensors}

    def rows(self, level: str) -> dict[str, dict[str, Any]]:
        return {row["tensor"]: row for row in self.manifest["levels"][level]["tensors"]}


Make = Callable[..., Built]


@pytest.fixture(scope="module")
def recipe(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("recipes") / "r.yaml", small_llama)


@pytest.fixture(scope="module")
def built(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(recipe, tmp_path_factory.mktemp("solved") / "dist")


@pytest.fixture(scope="module")
def plain(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("plain")
    return Built(write(folder / "r.yaml", small_llama, "llama.cpp"), folder / "dist")


class TestLevels:
    pytestmark = needs.LLAMA_CPP

    def test_only_the_payload_of_solved_tensors_is_another(self, built: Built, plain: Built) -> None:
        assert built.bytes_of("F16") == plain.bytes_of("F16")
        assert built.bytes_of("IQ2_XS") != plain.bytes_of("IQ2_XS")  # its attn_v and attn_output are Q2_K and larger
        for level in ("Q4_K_M", "Q2_K", "IQ2_XS"):
            ours, theirs = bytearray(built.bytes_of(level)), plain.bytes_of(level)
            solved = {name for name, row in built.rows(level).items() if row["outcome"] == "solved"}
            for name, tensor in built.tensors(level).items():
                place = slice(tensor.data_offset, tensor.data_offset + tensor.n_bytes)
                assert (ours[place] != theirs[place]) == (name in solved), (level, name)
                ours[place] = theirs[place]
            assert bytes(ours) == theirs

    def test_plan_and_manifest_say_which_tensors_and_how_well(
        self, built: Built, recipe: Path, tmp_path: Path, invoke: Command
    ) -> None:
        plan = json.loads(invoke("plan", recipe, "--dist", tmp_path / "dist", "--json").stdout)
        levels = {row["level"]: row for row in plan["levels"]}
        assert set(levels["Q4_K_M"]["error_feedback"]) == set(SOLVED)
        assert plan["scratch_bytes"] > 2 * 2 * (256**2 + 512**2)
        rows = built.rows("Q4_K_M")
        assert {name for name, row in rows.items() if row["outcome"] == "solved"} == set(SOLVED)
        for name in SOLVED:
            assert 0 < rows[name]["relative_error"] < rows[name]["relative_error_before"]
            assert rows[name]["type"] == built.manifest["levels"]["Q4_K_M"]["tensor_types"][name]
        assert "no Hessian" in rows["token_embd.weight"]["reason"]
        assert "IQ2_XS" in levels["IQ2_XS"]["not_solved"]["blk.0.ffn_up.weight"]
        assert "solve" not in built.manifest["levels"]["F16"]
        shown = invoke("plan", recipe, "--dist", tmp_path / "dist").stdout
        assert "14 of " in shown
        assert "llama.cpp's own bytes: " in shown
        assert "error feedback (as in GPTQ)" in (built.folder / "README.md").read_text()

    def test_the_error_of_the_file_is_the_manifests(self, built: Built, small_llama: Path) -> None:
        """Of down_proj, whose rows the converter leaves in their order, from the inputs of a plain run."""
        from gguf.quants import dequantize
        from transformers import AutoModelForCausalLM

        from quantize.calibration.tokens import load_tokenizer, sample_tokens

        plan = built.result.plan
        ids = torch.from_numpy(sample_tokens(plan.recipe.calibration, load_tokenizer(plan.source)).ids)
        model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
        linear = model.model.layers[1].mlp.down_proj
        seen: list[torch.Tensor] = []
        linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().reshape(-1, 512)))
        with torch.inference_mode():
            model(ids)
        hessian, weight = seen[0].t() @ seen[0], linear.weight.detach().double()
        tensor = built.tensors("Q4_K_M")["blk.1.ffn_down.weight"]
        rest = weight - torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).double()
        error = float(((rest @ hessian) * rest).sum() / ((weight @ hessian) * weight).sum())
        assert built.rows("Q4_K_M")["blk.1.ffn_down.weight"]["relative_error"] == pytest.approx(error, rel=0.02)

    def test_llama_cpp_loads_them(self, built: Built) -> None:
        from llama_cpp import Llama

        for level in ("Q4_K_M", "Q2_K"):
            llama = Llama(str(built.folder / f"small-{level}.gguf"), n_ctx=64, verbose=False)
            assert llama.create_completion("The ship", max_tokens=4, temperature=0)["choices"]

    def test_a_second_build_does_nothing_and_another_solve_is_stale(
        self, built: Built, recipe: Path, tmp_path: Path, invoke: Command
    ) -> None:
        dist = Path(shutil.copytree(built.dist, tmp_path / "dist"))
        assert Built(recipe, dist).result.built == []
        changed = ("--set", "gguf.solve=llama.cpp")
        states = json.loads(invoke("plan", recipe, "--dist", dist, "--json", *changed).stdout)["levels"]
        assert {row["level"]: row["state"] for row in states} == {
            "Q4_K_M": "stale", "Q2_K": "stale", "IQ2_XS": "stale", "F16": "fresh",
        }  # fmt: skip
        assert "solve" in states[0]["why"]

    @pytest.mark.full
    def test_a_level_above_the_size_is_solved_in_all_its_parts(self, small_llama: Path, tmp_path: Path) -> None:
        from gguf import GGUFReader

        whole = Built(write(tmp_path / "w.yaml", small_llama, levels=("Q8_0",)), tmp_path / "whole")
        path = write(tmp_path / "r.yaml", small_llama, levels=("Q8_0",), more=", max_file_size: 1MB")
        parts = sorted(Built(path, tmp_path / "dist").folder.glob("*-of-*.gguf"))
        assert len(parts) > 1
        found = {tensor.name: bytes(tensor.data) for part in parts for tensor in GGUFReader(part).tensors}
        assert found == {name: bytes(tensor.data) for name, tensor in whole.tensors("Q8_0").items()}

    def test_an_interrupted_solve_resumes_and_gives_the_same_bytes(
        self, built: Built, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        solved: list[Path] = []
        save = error_feedback._save_solved

        def failing(place: Path, rows: Any) -> None:
            if len(solved) == 7:
                raise KeyboardInterrupt
            save(place, rows)
            solved.append(place)

        with monkeypatch.context() as patched:
            patched.setattr(error_feedback, "_save_solved", failing)
            with pytest.raises(KeyboardInterrupt):
                Built(recipe, tmp_path / "dist")
        assert not list((tmp_path / "dist").glob("*/main/*Q4_K_M.gguf"))
        again: list[BlockRows] = []
        solve = blocks.solve_block_job

        def counted(job: BlockJob) -> Any:
            again.extend(job.parts)
            return solve(job)

        monkeypatch.setattr("quantize.executors.local.solve_block_job", counted)
        resumed = Built(recipe, tmp_path / "dist")
        assert "every block is solved already; putting into place" in resumed.lines
        for level in LEVELS:
            assert resumed.bytes_of(level) == built.bytes_of(level)
            assert resumed.manifest["levels"][level].get("tensors") == built.manifest["levels"][level].get("tensors")
        everything = {row["tensor"] + row["type"] for level in LEVELS[:3] for row in built.rows(level).values()}
        assert 0 < len(again) < len(everything)
        assert not (tmp_path / "dist" / ".quantize" / "unfinished").exists()

    @pytest.mark.full
    def test_damaged_hessians_are_one_error(
        self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*arguments: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(error_feedback.ErrorFeedback, "run", stop)
            with pytest.raises(KeyboardInterrupt):
                Built(recipe, tmp_path / "dist")
        file = next((tmp_path / "dist" / ".quantize" / "unfinished").glob("*/hessians/00001.safetensors"))
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
        with pytest.raises(DamagedBuild, match="quantize clean"):
            Built(recipe, tmp_path / "dist")

    def test_saved_statistics_take_the_place_of_the_forward_pass(
        self, built: Built, recipe: Path, small_llama: Path, tmp_path: Path
    ) -> None:
        first = write(tmp_path / "first.yaml", small_llama, "llama.cpp")
        Built(first, tmp_path / "dist", keep_statistics=True)
        second = Built(recipe, tmp_path / "dist")
        assert any(line.startswith("using stored statistics") for line in second.lines)
        assert second.bytes_of("Q4_K_M") == built.bytes_of("Q4_K_M")

    def test_what_cannot_be_factored_stays_llama_cpps_and_is_named(
        self, plain: Built, small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(hessian: torch.Tensor) -> Any:
            raise SolveError("its Hessian is not positive definite")

        monkeypatch.setattr(blocks, "prepare", refuse)
        found = Built(write(tmp_path / "r.yaml", small_llama, levels=("Q4_K_M",)), tmp_path / "dist")
        assert found.bytes_of("Q4_K_M") == plain.bytes_of("Q4_K_M")
        row = found.rows("Q4_K_M")["blk.0.attn_q.weight"]
        assert (row["outcome"], row["reason"]) == ("llama.cpp", "its Hessian is not positive definite")
        assert set(found.result.oddities["gguf/Q4_K_M"]["no error feedback"]) == set(SOLVED)

    def test_rows_of_no_whole_blocks_are_named(self, tmp_path: Path, invoke: Command) -> None:
        folder = small_wide_model(tmp_path / "small", intermediate_size=336, num_hidden_layers=1)
        path = write(tmp_path / "r.yaml", folder, levels=("Q4_K_M",))
        plan = json.loads(invoke("plan", path, "--dist", tmp_path / "dist", "--json").stdout)
        assert "whole blocks" in plan["levels"][0]["not_solved"]["blk.0.ffn_down.weight"]
        found = Built(path, tmp_path / "dist")
        assert found.rows("Q4_K_M")["blk.0.ffn_down.weight"]["outcome"] == "llama.cpp"
        assert found.rows("Q4_K_M")["blk.0.ffn_up.weight"]["outcome"] == "solved"

    def test_experts_are_solved_by_their_own_inputs(self, tmp_path: Path) -> None:
        from test_moe import SILENT
        from test_moe_gguf import SIZES, silence

        folder = silence(small_wide_model(tmp_path / "small", architecture="mixtral", **SIZES))
        found = Built(write(tmp_path / "r.yaml", folder, levels=("Q4_0",)), tmp_path / "dist")
        theirs = Built(write(tmp_path / "p.yaml", folder, "llama.cpp", ("Q4_0",)), tmp_path / "plain")
        rows = found.rows("Q4_0")
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            row = rows[f"blk.0.{name}.weight"]
            assert (row["outcome"], row["matrices"]) == ("partly", f"{6 - len(SILENT)} of 6")
            assert "no calibration token" in row["reason"]
            ours, plain = (one.tensors("Q4_0")[f"blk.0.{name}.weight"].data for one in (found, theirs))
            same = [np.array_equal(left, right) for left, right in zip(ours, plain, strict=True)]
            assert [place for place, equal in enumerate(same) if equal] == sorted(SILENT)

    def test_a_transposed_weight_is_solved_by_its_real_inputs(self, tokenizer_folder: Path, tmp_path: Path) -> None:
        """GPT-2 stores its linears [in, out]; the converter turns them."""
        from gguf.quants import dequantize
        from transformers import AutoModelForCausalLM

        from quantize.calibration.tokens import load_tokenizer, sample_tokens

        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_ctx": 256}
        folder = wide_model(tmp_path / "small", tokenizer_folder, architecture="gpt2", **sizes)
        found = Built(write(tmp_path / "r.yaml", folder, levels=("Q4_0",)), tmp_path / "dist")
        plan, rows = found.result.plan, found.rows("Q4_0")
        ids = torch.from_numpy(sample_tokens(plan.recipe.calibration, load_tokenizer(plan.source)).ids)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        block, tensors, seen = model.transformer.h[0], found.tensors("Q4_0"), dict[str, torch.Tensor]()
        places = {"attn_qkv": block.attn.c_attn, "attn_output": block.attn.c_proj, "ffn_up": block.mlp.c_fc}
        for name, linear in places.items():
            linear.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0].double()}))
        with torch.inference_mode():
            model(ids)
        for name, linear in places.items():
            inputs, weight = seen[name].reshape(-1, linear.weight.shape[0]), linear.weight.detach().double().t()
            tensor = tensors[f"blk.0.{name}.weight"]
            rest = weight - torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).double()
            error = float((inputs @ rest.t()).square().sum() / (inputs @ weight.t()).square().sum())
            row = rows[f"blk.0.{name}.weight"]
            assert row["outcome"] == "solved"
            assert row["relative_error"] == pytest.approx(error, rel=0.02)
            assert row["relative_error"] < 0.8 * row["relative_error_before"]

    @pytest.mark.full
    def test_rebuild_gives_the_same_bytes(self, built: Built, small_llama: Path, invoke: Command) -> None:
        done = invoke("rebuild", built.folder, "--source", small_llama, "--device", "cpu", "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        assert json.loads(done.stdout)[0]["differing"] == []

    @pytest.mark.full
    def test_ray_workers_give_the_same_bytes(self, built: Built, recipe: Path, tmp_path: Path) -> None:
        pytest.importorskip("ray", reason="the extra `ray` is not installed")
        found = Built(recipe, tmp_path / "dist", ray="auto", shards=1)
        assert found.bytes_of("Q4_K_M") == built.bytes_of("Q4_K_M")


@pytest.mark.parametrize(
    ("imatrix", "message"),
    [("false", "without an importance matrix there is no such pass"), ("./given.gguf", "only its diagonal")],
)
def test_without_a_pass_of_its_own_it_is_refused(tmp_path: Path, invoke: Command, imatrix: str, message: str) -> None:
    path = write(tmp_path / "r.yaml", tmp_path, levels=("Q4_K_M",), more=f", imatrix: {imatrix}")
    assert_refused(invoke("validate", path), "solve: error_feedback needs the whole Hessian", message, code=2)
