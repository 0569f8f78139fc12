"""What is fuzzed: each target yields inputs without end, a few words that show one, and what is done with it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

import quantize
from quantize.errors import QuantizeError
from quantize.formats.safetensors_header import read_header, write_hollow
from quantize.options import PlanOptions
from quantize.planning.planner import plan_recipe
from quantize.recipe.shipped import shipped_recipes
from tests.fuzzing.judge import Fault, command
from tests.fuzzing.material import Material
from tests.fuzzing.mutate import LONG, as_json, mutated_bytes, mutated_data, odd_value

Action = Callable[[], Any]
Inputs = Iterator[tuple[str, Action]]
MANIFEST = "quantize-manifest.json"


def recipe_bytes(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """Damaged YAML."""
    texts = [path.read_bytes() for path in shipped_recipes().values()] + [material.recipe.read_bytes()]
    path = folder / "r.yaml"
    while True:
        data = mutated_bytes(dice.choice(texts), dice)
        path.write_bytes(data)
        yield repr(data[:200]), lambda: quantize.load_recipe(path)


def recipe_structure(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """YAML that is sound, of another structure and other values."""
    trees = [yaml.safe_load(path.read_bytes()) for path in [*shipped_recipes().values(), material.recipe]]
    path = folder / "r.yaml"
    while True:
        data = mutated_data(dice.choice(trees), dice)
        path.write_bytes(yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass"))
        yield repr(data)[:200], lambda: quantize.load_recipe(path)


def overrides(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """``--set``."""
    keys = (
        "model.source", "model.name", "model", "release.repo", "release.owner", "calibration.samples", "gptq", "x.y.z",
        "calibration.dataset", "gptq.variants.0.bits", "gptq.variants.1", "gptq.variants.9.bits", "gptq.matrix.bits",
        "gguf.levels", "gguf.tensor_types", "awq", "measure.dataset", "extends", "gptq.damp_percent", "",
    )  # fmt: skip
    while True:
        value = dice.choice((repr, str, lambda one: json.dumps(one, default=str)))(odd_value(dice))
        key = dice.choice(keys) if dice.random() < 0.9 else LONG
        word = f"{key}{dice.choice(('=', '=', '=', '=', '', '=='))}{value}"
        if dice.random() < 0.3:
            word = mutated_bytes(word.encode("utf-8", "replace"), dice).decode("utf-8", "replace")
        yield repr(word)[:200], lambda word=word: quantize.load_recipe(material.recipe, [word])


def config_and_plan(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """``config.json`` of a model that is planned."""
    model = material.hollow(folder / "model")
    config = json.loads((model / "config.json").read_bytes())
    loaded = quantize.load_recipe(material.recipe, [f"model.source={model}"])
    while True:
        one = mutated_data(config, dice)
        if dice.random() < 0.2:
            one = {**config, "text_config": mutated_data(config, dice), **{dice.choice(list(config)): None}}
        if isinstance(one, dict) and dice.random() < 0.5:  # numbers that something is counted with
            one[dice.choice(COUNTED)] = odd_value(dice)
        text = as_json(one, dice) if dice.random() < 0.1 else json.dumps(one, default=str).encode()
        (model / "config.json").write_bytes(text)
        yield repr(text[:200]), lambda: plan_recipe(loaded, PlanOptions(dist=folder / "dist")).as_data()


COUNTED = (
    "hidden_size", "n_embd", "vocab_size", "num_hidden_layers", "n_layer", "num_experts_per_tok", "text_config",
    "max_position_embeddings", "n_positions", "intermediate_size", "num_attention_heads", "model_type", "architectures",
    "quantization_config", "auto_map", "dtype", "torch_dtype", "rope_parameters",
)  # fmt: skip


def safetensors_header(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """The header of the weights' file."""
    model = material.hollow(folder / "model")
    loaded = quantize.load_recipe(material.recipe, [f"model.source={model}"])
    whole = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + length])
    while True:
        if dice.random() < 0.5:
            data = mutated_bytes(whole[: 8 + length], dice)
        else:
            text = as_json(table, dice)
            data = len(text).to_bytes(8, "little") + text
        (model / "model.safetensors").write_bytes(data)
        with (model / "model.safetensors").open("r+b") as file:
            file.truncate(len(data) + len(whole) - 8 - length)
        yield repr(data[:200]), lambda: plan_recipe(loaded, PlanOptions(dist=folder / "dist")).as_data()


def safetensors_index(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """The index of a sharded model."""
    model = material.hollow(folder / "model")
    loaded = quantize.load_recipe(material.recipe, [f"model.source={model}"])
    whole = (model / "model.safetensors").read_bytes()
    tensors = read_header(lambda first, last: whole[first:last]).tensors
    names, index = sorted(tensors), {"metadata": {"total_size": 1}, "weight_map": {}}
    (model / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_hollow(model / file, {name: tensors[name] for name in part})
        index["weight_map"] |= dict.fromkeys(part, file)
    while True:
        text = as_json(index, dice) if dice.random() < 0.7 else mutated_bytes(json.dumps(index).encode(), dice)
        (model / "model.safetensors.index.json").write_bytes(text)
        yield repr(text[:200]), lambda: plan_recipe(loaded, PlanOptions(dist=folder / "dist")).as_data()


def corpora(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """Texts to calibrate on, plain and as records."""
    from quantize.calibration.tokens import sample_tokens

    records = b"".join(json.dumps({"text": f"a line {n} of text", "n": n}).encode() + b"\n" for n in range(40))
    plain = "Ein Text aus Wörtern, weit genug für ein Fenster.\n".encode() * 40
    while True:
        name, whole = dice.choice((("t.jsonl", records), ("t.txt", plain)))
        data = mutated_bytes(whole, dice)
        (folder / name).write_bytes(data)
        changes = [f"calibration.dataset={folder / name}", "calibration.samples=2", "calibration.sequence_length=16"]
        loaded = quantize.load_recipe(material.recipe, changes)
        yield f"{name} {data[:200]!r}", lambda loaded=loaded: sample_tokens(loaded.recipe.calibration, _Bytes())


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id = None

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def source_card(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """The source's README, from which our card is made."""
    from quantize.publishing.card import render
    from quantize.publishing.source_card import front_matter

    model = material.hollow(folder / "model")
    card = CARD.encode()
    front = yaml.safe_load(CARD.split("---")[1])
    loaded = quantize.load_recipe(material.recipe, [f"model.source={model}"])
    plan = plan_recipe(loaded, PlanOptions(dist=folder / "dist"))

    def action() -> None:
        ours, _ = front_matter(render(plan, "gptq"))
        if ours is None:
            raise Fault("our card opens with no readable front matter")

    while True:
        data = mutated_bytes(card, dice)
        if dice.random() < 0.5:
            changed = yaml.safe_dump(mutated_data(front, dice), allow_unicode=True)
            data = f"---\n{changed}---\nbody\n".encode("utf-8", "replace")
        (model / "README.md").write_bytes(data)
        yield repr(data[:200]), action


CARD = """---
license: llama2
license_name: custom
license_link: LICENSE
base_model: [a/b]
language: [en, de]
tags: [chat, x]
pipeline_tag: text-generation
library_name: transformers
---

# A model
[link](LICENSE) | Name | Size |
"""


def lint(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """A branch of anybody's: configs, headers, card, manifest."""
    branch = folder / "branch"
    shutil.copytree(material.branch, branch)
    names = sorted(path.name for path in branch.iterdir() if path.suffix in {".json", ".md", ".safetensors"})
    wholes = {name: (branch / name).read_bytes() for name in names}
    while True:
        name = dice.choice(names)
        data = mutated_bytes(wholes[name], dice)
        if name.endswith(".json") and dice.random() < 0.7:
            data = as_json(json.loads(wholes[name]), dice)
        elif name.endswith(".safetensors"):
            length = int.from_bytes(wholes[name][:8], "little")
            data = mutated_bytes(wholes[name][: 8 + length], dice) + wholes[name][8 + length :]
        elif name.endswith(".md") and dice.random() < 0.5:
            front = yaml.safe_dump(mutated_data(yaml.safe_load(CARD.split("---")[1]), dice), allow_unicode=True)
            data = f"---\n{front}---\n| main | 1 GB |\n".encode("utf-8", "replace")
        (branch / name).write_bytes(data)

        def action(name: str = name) -> None:
            try:
                command("lint", branch)
            finally:
                (branch / name).write_bytes(wholes[name])

        yield f"{name} {data[:200]!r}", action


def gguf_header(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """The header of a GGUF file, linted."""
    whole = material.gguf()
    place = folder / "x-GGUF"
    place.mkdir()
    while True:
        data = mutated_bytes(whole, dice)
        (place / "x.Q4_K_M.gguf").write_bytes(data)
        yield repr(data[:200]), lambda: command("lint", place)


def gguf_source(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """A GGUF file as a source. Sound headers cost seconds: transformers converts them."""
    whole = material.gguf()
    path = folder / "x.gguf"
    loaded = quantize.load_recipe(material.recipe, [f"model.source={path}"])
    while True:
        data = mutated_bytes(whole, dice)
        path.write_bytes(data)
        yield repr(data[:200]), lambda: plan_recipe(loaded, PlanOptions(dist=folder / "dist"))


def unfinished(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """What lies in the folder of an unfinished build, whatever its format is."""
    whole, dist = material.unfinished, folder / "dist"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    while True:
        shutil.rmtree(dist, ignore_errors=True)
        shutil.copytree(whole, dist)
        shown = []
        for name in dice.sample(files, dice.randint(1, min(2, len(files)))):
            data = (whole / name).read_bytes()
            if name.suffix == ".json" and dice.random() < 0.7:
                data = as_json(json.loads(data), dice)
            else:
                data = mutated_bytes(data, dice)
            (dist / name).write_bytes(data)
            shown.append(str(name))
        cheap = (["clean", "--dist", dist, "--dry-run"], ["status", material.halting, "--dist", dist])
        others = ["clean", "--dist", dist, "--yes"], ["build", material.halting, "--dist", dist, "--no-measure"]
        words = dice.choice(cheap * 4 + others)
        yield f"{' '.join(shown)} {words[0]}", lambda words=words: command(*words)


def manifests(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """A manifest of anybody's, in front of every command that reads one."""
    dist = folder / "dist"
    shutil.copytree(material.dist, dist)
    path = next(dist.glob("*/main")) / MANIFEST
    data = json.loads(path.read_bytes())
    short = data | {"ledger": data["ledger"][:2]}  # most of a manifest are modules, all alike
    levels = json.loads(json.dumps(LEVELS)) | {"source": data["source"], "versions": data["versions"]}
    commands: list[tuple[object, ...]] = [
        ("status", material.recipe, "--dist", dist), ("plan", material.recipe, "--dist", dist),
        ("explain", material.recipe, "--dist", dist), ("lint", path.parent), ("verify", path.parent, "--no-load"),
        ("report", material.recipe, "--dist", dist, "--out", folder / "report.html"),
        ("status", material.recipe, "--dist", dist, "--json"),
        ("card", material.recipe, "--dist", dist, "--print", "gptq"), ("matrix", material.recipe, "--dist", dist),
        *[("rebuild", path, "--source", material.model, "--device", "cpu")] * 8,
    ]  # fmt: skip
    while True:
        text = as_json(dice.choice((short, short, levels)), dice)
        path.write_bytes(text)
        words = dice.choice(commands)

        def action(words: tuple[object, ...] = words) -> None:
            with patch("quantize.rebuilding.rebuild.build_recipe", _no_build):
                command(*words)

        yield f"{words[0]} {text[:200]!r}", action


def _no_build(*arguments: Any, **settings: Any) -> Any:
    raise QuantizeError("the recipe is sound; it is not built here")


LEVELS = {
    "schema": 1, "repo": "local/x-GGUF", "branch": "main", "key": "k", "files": {}, "compute": {"device": "cpu"},
    "levels": {"Q4_0": {"key": "k", "files": {"x-Q4_0.gguf": {"bytes": 1, "sha256": "0" * 64}}, "key_inputs": {
        "conversion": {"outtype": "f16", "name": "x", "authorship": {
            "general.quantized_by": "me", "general.license": "mit", "general.author": "me",
            "general.base_models": [{"name": "x", "organization": "a", "repo_url": "https://huggingface.co/a/b"}]}},
        "tensor_types": {}, "max_file_size": 10**9, "imatrix": {"dataset": "pydoc"}, "level": "Q4_0"}}},
    "imatrix": {"key": "k", "shards": 1, "files": {"x-imatrix.gguf": {"bytes": 1, "sha256": "0" * 64}}, "key_inputs": {
        "calibration": {"corpora": [{"preset": "pydoc", "sha256": "0" * 64}], "samples": 2, "sequence_length": 64,
                        "seed": 0}, "compute_dtype": "float32"}},
}  # fmt: skip


def chat_template(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """A chat template, which runs in a child."""
    from quantize.publishing.prompt import prompt_template

    while True:
        data = mutated_bytes(dice.choice(TEMPLATES).encode(), dice)
        (folder / "chat_template.jinja").write_bytes(data)

        def action() -> None:
            shown = prompt_template(folder)
            if shown is not None and " at 0x" in shown:
                raise Fault(f"an address is shown: {shown[:100]}")

        yield repr(data[:200]), action


TEMPLATES = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "{{ messages }}{{ namespace() }}{{ cycler }}{{ lipsum }}{{ self }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
)


def tokenizer(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """A tokenizer's files."""
    from quantize.calibration.tokens import load_tokenizer, sample_tokens

    model = material.hollow(folder / "model")
    loaded = quantize.load_recipe(
        material.recipe, [f"model.source={model}", "calibration.samples=1", "calibration.sequence_length=8"]
    )
    names = [name for name in ("tokenizer.json", "tokenizer_config.json") if (model / name).is_file()]
    wholes = {name: (model / name).read_bytes() for name in names}
    (folder / "t.txt").write_text("A short text to cut windows from. " * 20)
    brief = quantize.load_recipe(material.recipe, [f"calibration.dataset={folder / 't.txt'}", "calibration.samples=1",
                                                   "calibration.sequence_length=8"]).recipe.calibration  # fmt: skip
    while True:
        name = dice.choice(names)
        data = mutated_bytes(wholes[name], dice)
        if dice.random() < 0.8:
            data = as_json(_without_vocabulary(json.loads(wholes[name]), dice), dice)
        (model / name).write_bytes(data)

        def action(name: str = name) -> None:
            try:
                # planned anew: files that changed since a plan are refused before anything reads them
                sample_tokens(brief, load_tokenizer(plan_recipe(loaded, PlanOptions(dist=folder / "dist")).source))
            finally:
                (model / name).write_bytes(wholes[name])

        yield f"{name} {data[:200]!r}", action


def _without_vocabulary(data: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """The same with a small vocabulary, so that changes meet other parts too."""
    if isinstance(data.get("model"), dict) and dice.random() < 0.5:
        data["model"] |= {"merges": [], "vocab": dict(list(data["model"]["vocab"].items())[:300])}
    return data


def hub_answers(material: Material, folder: Path, dice: random.Random) -> Inputs:
    """JSON of another shape from a hub, through the real client."""
    from quantize.hub.client import Hub
    from tests.hub_server import TOKEN, HubServer

    server = HubServer()
    repo = server.repos.setdefault("a/b", _repo())
    wholes = {
        "refs": {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.branches["main"]}],
                 "tags": [], "converts": []},
        "tree": [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}],
    }  # fmt: skip
    hub = Hub(server.url)
    while True:
        word = dice.choice(list(wholes))
        data = as_json(wholes[word], dice) if dice.random() < 0.8 else b"<html>maintenance</html>"

        def answer(handler: Any, data: bytes = data) -> bool:
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
            return True

        def action(word: str = word, answer: Any = answer) -> None:
            server.faults[:] = [(f"/{word}", answer)]
            with (
                patch("huggingface_hub.constants.HF_HUB_OFFLINE", False),
                patch.dict("os.environ", {"HF_TOKEN": TOKEN}),
            ):
                heads, files = hub.heads("a/b"), hub.files("a/b", "main")
            if server.faults:
                raise Fault("the answer was not asked for")
            if not all(isinstance(name, str) for name in (*heads, *heads.values(), *files)):
                raise Fault("what is no name is taken for one")

        yield f"{word} {data[:200]!r}", action


def _repo() -> Any:
    from tests.hub_server import Repo

    repo = Repo()
    repo.commit("main", {"config.json": b"{}"})
    return repo


@dataclass(frozen=True)
class Target:
    """inputs: makes them. bounded: how many the test runs."""

    inputs: Callable[[Material, Path, random.Random], Inputs]
    bounded: int


TARGETS = {
    "recipe": Target(recipe_bytes, 700),
    "structure": Target(recipe_structure, 500),
    "set": Target(overrides, 700),
    "config": Target(config_and_plan, 200),
    "header": Target(safetensors_header, 300),
    "index": Target(safetensors_index, 200),
    "corpora": Target(corpora, 300),
    "card": Target(source_card, 60),
    "lint": Target(lint, 150),
    "gguf": Target(gguf_header, 300),
    "gguf-source": Target(gguf_source, 30),
    "unfinished": Target(unfinished, 40),
    "manifest": Target(manifests, 250),
    "template": Target(chat_template, 12),
    "tokenizer": Target(tokenizer, 100),
    "hub": Target(hub_answers, 60),
}
