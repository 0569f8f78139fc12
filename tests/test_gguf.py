"""GGUF: sizes before work, levels as llama.cpp makes them, the importance matrix of the pass, and every mistake."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
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
from reporting import Remembering
from snippets import run_snippets
from tiny import SMALL, small_wide_model, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantize
from quantize.executors import quantizers
from quantize.gguf.imatrix import Importance, read_importance, write_importance

pytestmark = [*needs.LLAMA_CPP, pytest.mark.usefixtures("forked_converter")]

LEVELS = ("Q4_K_M", "Q8_0", "IQ2_XS", "Q3_K_XL", "F16")
RECIPE = (
    SMALL
    + """\
calibration: {{dataset: pydoc, samples: 4, sequence_length: 64, compute_dtype: float32}}
{body}
"""
)
BODY = f"""\
gptq: {{variants: [{{group_size: 64}}]}}
awq: {{variants: [{{group_size: 64}}]}}
gguf: {{levels: [{", ".join(LEVELS)}]}}
"""


@pytest.fixture(scope="module")
def small(small_llama: Path) -> Path:
    return small_llama


def write(path: Path, source: Path, body: str = BODY) -> Path:
    path.write_text(RECIPE.format(source=source, body=body))
    return path


@pytest.fixture(scope="module")
def recipe(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("recipes") / "small.yaml", small)


class Built:
    def __init__(self, recipe: Path, dist: Path) -> None:
        told = Remembering()
        self.lines = told.lines
        self.plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=dist))
        self.result = quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=dist, device="cpu"), told)
        self.folder = dist / "small-GGUF" / "main"
        self.manifest = json.loads((self.folder / "quantize-manifest.json").read_text())

    def file(self, level: str) -> Path:
        return self.folder / f"small-{level}.gguf"


@pytest.fixture(scope="module")
def built(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(recipe, tmp_path_factory.mktemp("gguf") / "dist")


# -- what comes out


def test_all_methods_share_one_pass(built: Built) -> None:
    passes = [line for line in built.lines if line.startswith("calibrating once")]
    assert passes == [
        "calibrating once on 256 tokens for 2 branches and an importance matrix (cpu, float32, solver in numba)"
    ]
    assert built.result.built == ["gptq/main", "awq/main", *(f"gguf/{level}" for level in LEVELS)]


def test_planned_sizes_are_the_files(built: Built) -> None:
    assert built.plan.gguf
    planned = {item.level: item.nbytes for item in built.plan.gguf.levels}
    assert planned == {level: built.file(level).stat().st_size for level in LEVELS}


def test_headers_alone_give_the_same_sizes(built: Built, small: Path, tmp_path: Path) -> None:
    """A hub model is planned before its weights are downloaded."""
    from quantize.gguf.quantize import ANY, predict, request

    assert built.plan.gguf
    conversion = built.plan.gguf.conversion
    checkpoint = dataclasses.replace(conversion.source.checkpoint, folder=None)
    hashes = {**conversion.source.hashes, "another.safetensors": "so that the cache does not know it"}
    source = dataclasses.replace(conversion.source, checkpoint=checkpoint, remote_hashes=hashes, small_files=small)
    before = (small / "model.safetensors").read_bytes()
    header = dataclasses.replace(conversion, source=source).header()
    assert (small / "model.safetensors").read_bytes() == before
    wish = request("Q8_0", header.path, tmp_path, threads=1, imatrix=ANY, dry_run=True,
                   metadata=built.plan.gguf.metadata(14))  # fmt: skip
    assert predict({"Q8_0": wish}, header)["Q8_0"].nbytes == built.file("Q8_0").stat().st_size


def test_types_in_the_files_are_the_manifests(built: Built) -> None:
    from gguf import GGUFReader

    for level in LEVELS:
        real = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(built.file(level)).tensors}
        entry = built.manifest["levels"][level]
        assert real == entry["tensor_types"]
        assert entry["fallbacks"] == []
    types = built.manifest["levels"]["Q3_K_XL"]["tensor_types"]
    assert (types["token_embd.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q3_K")


def test_files_say_what_they_are_and_of_whom(built: Built) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(built.file("Q4_K_M")).fields
    said = {key: fields[key].contents() for key in fields if key.startswith(("general.", "quantize."))}
    assert said["general.name"] == "Small"
    assert said["general.quantized_by"] == "me"
    assert said["general.license"] == "apache-2.0"
    assert said["quantize.imatrix.file"] == "small-imatrix.gguf"
    assert said["quantize.imatrix.dataset"] == "pydoc"
    assert (said["quantize.imatrix.entries_count"], said["quantize.imatrix.chunks_count"]) == (14, 4)
    assert "tokenizer.chat_template" in fields


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_is_what_llama_cpp_makes_of_the_same_file(built: Built, tmp_path: Path, level: str) -> None:
    import llama_cpp

    from quantize.recipe.levels import LEVELS as KNOWN

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = KNOWN[level].ftype, 2
    if KNOWN[level].wide:
        params.output_tensor_type = params.token_embedding_type = 8
    keep: list[Any] = []
    if level != "F16":
        importance = read_importance(built.folder / "small-imatrix.gguf")
        data = (llama_cpp.llama_model_imatrix_data * (len(importance.sums) + 1))()
        for place, name in enumerate(importance.sums):
            mean = (importance.sums[name] / np.float32(importance.counts[name])).astype(np.float32)
            keep.append(mean)
            data[place].name, data[place].size = name.encode(), mean.size
            data[place].data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = data
        said = [("file", "small-imatrix.gguf"), ("dataset", "pydoc"), ("entries_count", 14), ("chunks_count", 4)]
        metadata = (llama_cpp.llama_model_kv_override * 5)()
        for place, (key, value) in enumerate(said):
            metadata[place].key = f"quantize.imatrix.{key}".encode()
            metadata[place].tag = 0 if isinstance(value, int) else 3
            if isinstance(value, int):
                metadata[place].value.val_i64 = value
            else:
                metadata[place].value.val_str = value.encode()
        params.kv_overrides = metadata
    assert built.plan.gguf
    source, target = built.plan.gguf.conversion.path, tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    assert target.read_bytes() == built.file(level).read_bytes()


@pytest.mark.parametrize("level", LEVELS)
def test_each_file_loads_and_continues_a_prompt(built: Built, level: str) -> None:
    from llama_cpp import Llama

    llama = Llama(str(built.file(level)), n_ctx=64, verbose=False)
    written = list(itertools.islice(llama.generate(llama.tokenize(b"The ship"), temp=0), 4))  # though it ends its text
    assert len(written) == 4
    assert all(0 <= token < llama.n_vocab() for token in written)


def test_the_conversion_answers_as_its_source(built: Built) -> None:
    found = built.manifest["conversion"]
    assert found["type"] == "F16"
    assert found["kl_divergence"] < 1e-4
    assert found["top1_agreement"] == 1
    assert found["same_tokens"] is True


@torch.no_grad()
def test_the_importance_matrix_is_the_sum_of_squares(built: Built, small: Path) -> None:
    from quantize.calibration.tokens import load_tokenizer, sample_tokens

    ids = sample_tokens(built.plan.recipe.calibration, load_tokenizer(built.plan.source)).ids
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = inputs[0].double().square().sum(dim=(0, 1))

        return add

    places = {"blk.1.attn_q": "self_attn.q_proj", "blk.1.attn_output": "self_attn.o_proj",
              "blk.1.ffn_down": "mlp.down_proj"}  # fmt: skip
    for name, module in places.items():
        model.get_submodule(f"model.layers.1.{module}").register_forward_pre_hook(hook(name))
    model(torch.from_numpy(ids))
    importance = read_importance(built.folder / "small-imatrix.gguf")
    assert len(importance.sums) == 14
    assert (importance.dataset, importance.chunks, importance.chunk_size) == ("pydoc", 4, 64)
    for name, expected in sums.items():
        assert importance.counts[f"{name}.weight"] == 256
        (found,) = torch.from_numpy(importance.sums[f"{name}.weight"]).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_the_card_lists_every_file(built: Built) -> None:
    card = (built.folder / "README.md").read_text()
    for level in LEVELS:
        assert f"| {level} |" in card
    assert "small-imatrix.gguf" in card
    assert "me/small-GPTQ" in card


def run_offline(folder: Path) -> None:
    """Every Python snippet of the card in ``folder``, its downloads answered with the files beside it."""
    prelude = f"""
import llama_cpp, pathlib
def from_pretrained(repo, filename, additional_files=(), **settings):
    assert repo == "me/" + pathlib.Path({str(folder.parent)!r}).name
    assert all((pathlib.Path({str(folder)!r}) / name).is_file() for name in [filename, *additional_files])
    return llama_cpp.Llama(str(pathlib.Path({str(folder)!r}) / filename), n_ctx=64, verbose=False)
llama_cpp.Llama.from_pretrained = from_pretrained
"""
    run_snippets(folder / "README.md", prelude)


def test_every_python_snippet_of_the_card_runs(built: Built) -> None:
    run_offline(built.folder)


def test_a_level_that_the_recipe_drops_is_pruned_with_its_file(
    built: Built, recipe: Path, tmp_path: Path, invoke: Command
) -> None:
    dist = Path(shutil.copytree(built.folder.parent.parent, tmp_path / "dist"))
    fewer = write(tmp_path / "fewer.yaml", Path(built.plan.recipe.model.source), BODY.replace(", F16]", "]"))
    done = invoke("prune", fewer, "--dist", dist, "--where", "dist", "--yes", "--json")
    assert [(row["level"], row["nbytes"]) for row in json.loads(done.stdout)] == [
        ("F16", built.file("F16").stat().st_size)
    ]
    names = {path.name for path in (dist / "small-GGUF" / "main").iterdir()}
    assert names == {path.name for path in built.folder.iterdir()} - {"small-F16.gguf"}
    status = json.loads(invoke("status", fewer, "--dist", dist, "--json").stdout)
    assert {row["state"] for row in status["branches"]} == {"fresh"}


# -- again


def test_a_second_build_does_nothing_and_a_new_level_needs_no_pass(built: Built, recipe: Path, tmp_path: Path) -> None:
    dist = Path(shutil.copytree(built.folder.parent.parent, tmp_path / "dist"))
    again = Built(recipe, dist)
    assert again.result.built == []
    assert len(again.result.fresh) == 2 + len(LEVELS)
    source = again.plan.recipe.model.source
    more = write(tmp_path / "more.yaml", Path(source), BODY.replace("F16]", "F16, Q6_K]"))
    third = Built(more, dist)
    assert third.result.built == ["gguf/Q6_K"]
    assert not any("calibrating" in line for line in third.lines)
    assert third.file("Q4_K_M").read_bytes() == built.file("Q4_K_M").read_bytes()


def test_full_width_alone_needs_no_pass(recipe: Path, tmp_path: Path) -> None:
    told = Remembering()
    loaded = quantize.load_recipe(recipe)
    result = quantize.build(loaded, quantize.BuildOptions(dist=tmp_path / "dist", only=("F16",), device="cpu"), told)
    assert result.built == ["gguf/F16"]
    assert not any("calibrating" in line for line in told.lines)


def test_a_dist_named_from_the_current_folder_is_that_of_the_children_too(
    small: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [Q8_0], imatrix: false}")
    built = invoke("build", path, "--dist", "dist", "--device", "cpu")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "dist" / "small-GGUF" / "main" / "small-Q8_0.gguf").is_file()


def test_an_importance_matrix_from_a_file_is_taken(built: Built, small: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.gguf"
    own = read_importance(built.folder / "small-imatrix.gguf")
    write_importance(given, Importance(own.sums, own.counts, "elsewhere", 7, 64))
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [IQ2_XS], imatrix: ./given.gguf}")
    found = Built(path, tmp_path / "dist")
    assert not any("calibrating" in line for line in found.lines)
    from gguf import GGUFReader

    fields = GGUFReader(found.file("IQ2_XS")).fields
    assert fields["quantize.imatrix.dataset"].contents() == "elsewhere"
    assert fields["quantize.imatrix.chunks_count"].contents() == 7


def test_rows_that_fill_no_block_fall_back_and_plan_says_so(tmp_path: Path, invoke: Command) -> None:
    folder = small_wide_model(tmp_path / "narrow", intermediate_size=320, num_hidden_layers=1)
    path = write(tmp_path / "r.yaml", folder, "gguf: {levels: [Q4_K_M], tensor_types: {ffn_up: q5_1}}")
    plan = json.loads(invoke("plan", path, "--dist", tmp_path / "dist", "--json").stdout)
    assert plan["levels"][0]["fallbacks"] == ["blk.0.ffn_down.weight"]
    assert invoke("build", path, "--dist", tmp_path / "dist", "--device", "cpu").returncode == 0
    manifest = json.loads((tmp_path / "dist" / "narrow-GGUF" / "main" / "quantize-manifest.json").read_text())
    types = manifest["levels"]["Q4_K_M"]["tensor_types"]
    assert types["blk.0.ffn_up.weight"] == "Q5_1"
    assert types["blk.0.ffn_down.weight"] in {"Q8_0", "Q5_0"}


def test_a_level_above_the_size_is_split_and_loads(small: Path, tmp_path: Path, invoke: Command) -> None:
    from gguf import GGUFReader
    from llama_cpp import Llama

    def build(size: str) -> tuple[list[Path], str]:
        path = write(tmp_path / "r.yaml", small, f"gguf: {{levels: [Q8_0], imatrix: false, max_file_size: {size}}}")
        assert invoke("build", path, "--dist", tmp_path / "dist", "--device", "cpu").returncode == 0
        files = sorted((tmp_path / "dist" / "small-GGUF" / "main").glob("*.gguf"))
        llama = Llama(str(files[0]), n_ctx=64, verbose=False)
        return files, llama.create_completion("The ship", max_tokens=8, temperature=0)["choices"][0]["text"]

    whole, said = build("50GB")
    assert [file.name for file in whole] == ["small-Q8_0.gguf"]
    names = {tensor.name for tensor in GGUFReader(whole[0]).tensors}
    parts, again = build("1MB")
    assert [file.name for file in parts] == [
        f"small-Q8_0-{n:05d}-of-{len(parts):05d}.gguf" for n in range(1, len(parts) + 1)
    ]
    assert len(parts) > 1
    run_offline(parts[0].parent)
    assert {tensor.name for part in parts for tensor in GGUFReader(part).tensors} == names
    assert again == said


# -- mistakes


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{levels: [Q4_K_X]}", "did you mean 'Q4_K_"),
        ("{levels: [IQ2_XS], imatrix: false}", "IQ2_XS cannot be made without an importance matrix"),
        ("{levels: []}", "must not be empty"),
        ("{levels: [Q8_0], tensor_types: {'(': q8_0}}", "is not a regular expression"),
        ("{levels: [Q8_0], tensor_types: {ffn_up: q9}}", "is not a type of GGUF tensors"),
    ],
)
def test_bad_sections_are_one_sentence(
    small: Path, tmp_path: Path, invoke: Command, section: str, message: str
) -> None:
    result = invoke("validate", write(tmp_path / "r.yaml", small, f"gguf: {section}"))
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def refused(invoke: Command, path: Path, dist: Path, message: str, code: int = 2) -> None:
    result = invoke("build", path, "--dist", dist, "--device", "cpu")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (result.returncode, len(errors)) == (code, 1), result.stderr
    assert message in errors[0]
    assert not list(dist.glob("*-GGUF/main/*.gguf"))


def test_a_tokenizer_that_llama_cpp_does_not_know(tmp_path: Path, invoke: Command) -> None:
    path = write(tmp_path / "r.yaml", write_model(tmp_path / "m"), "gguf: {levels: [Q8_0]}")
    refused(invoke, path, tmp_path / "dist", "llama.cpp does not recognise its tokenizer")


def test_a_model_that_cannot_be_a_gguf_is_still_built_as_gptq(tmp_path: Path, invoke: Command) -> None:
    path = write(tmp_path / "r.yaml", write_model(tmp_path / "m"), "gptq: {variants: [{}]}\ngguf: {levels: [Q8_0]}")
    assert "llama.cpp does not recognise" in invoke("plan", path, "--dist", tmp_path / "dist").stdout
    assert invoke("build", path, "--dist", tmp_path / "dist", "--only", "gptq/*", "--device", "cpu").returncode == 0


def test_an_architecture_that_the_converter_does_not_know(small: Path, tmp_path: Path, invoke: Command) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
    path = write(tmp_path / "r.yaml", folder, "gguf: {levels: [Q8_0]}")
    refused(invoke, path, tmp_path / "dist", "does not know the architecture OddForCausalLM")


def test_a_corrupt_importance_matrix(small: Path, tmp_path: Path, invoke: Command) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [Q8_0], imatrix: ./bad.gguf}")
    refused(invoke, path, tmp_path / "dist", "importance matrix")


def test_a_conversion_that_answers_otherwise(small: Path, tmp_path: Path, invoke: Command) -> None:
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [Q8_0], logits_tolerance: 1.0e-30}")
    refused(invoke, path, tmp_path / "dist", "logits differ from the source's", code=1)


def test_too_little_disk_for_the_intermediate_file(
    small: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [Q8_0], intermediate: F32, imatrix: false}")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("quantize.gguf.convert.shutil.disk_usage", lambda folder: usage)
    refused(invoke, path, tmp_path / "dist", "the intermediate F32 file takes", code=1)


def test_a_killed_level_leaves_nothing(
    small: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = quantizers.start

    def killed(wish: Any) -> Any:
        child = begin(wish)
        child.kill()
        return child

    monkeypatch.setattr(quantizers, "start", killed)
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [Q8_0], imatrix: false}")
    refused(invoke, path, tmp_path / "dist", "was killed by signal 9", code=1)
    assert not list((tmp_path / "dist" / ".quantize").glob("*.part"))


def test_without_llama_cpp_plan_says_how_to_get_it_and_gptq_goes_on(
    small: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.gguf.toolchain._installed", lambda name: False)
    path = write(tmp_path / "r.yaml", small)
    plan = invoke("plan", path, "--dist", tmp_path / "dist")
    assert plan.returncode == 0
    assert "GGUF needs the packages llama_cpp and sentencepiece" in plan.stdout
    assert "GGUF levels cannot be built; a build of the others needs --only" in plan.stdout
    planned = json.loads(invoke("plan", path, "--dist", tmp_path / "dist", "--json").stdout)
    assert {level["state"] for level in planned["levels"]} == {"refused"}
    assert invoke("build", path, "--dist", tmp_path / "dist", "--only", "gptq/*", "--device", "cpu").returncode == 0
    refused(invoke, path, tmp_path / "other", "GGUF needs the packages")


def test_a_llama_cpp_dir_that_is_none(
    small: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    path = write(tmp_path / "r.yaml", small, "gguf: {levels: [Q8_0]}")
    refused(invoke, path, tmp_path / "dist", "is not a llama.cpp source tree")


def test_tokens_are_llama_cpps(built: Built, small: Path) -> None:
    from llama_cpp import Llama

    text = "Numbers 12345, naïve façade, and\n\n\ttabs."
    llama = Llama(str(built.file("Q8_0")), vocab_only=True, verbose=False)
    expected = AutoTokenizer.from_pretrained(small)(text, add_special_tokens=False)["input_ids"]
    assert llama.tokenize(text.encode(), add_bos=False) == expected
