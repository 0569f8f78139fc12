"""Input made to harm: each gives one sentence in bounded time and memory, runs nothing, and touches nothing outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import assert_refused, contents
from tiny import write_recipe

from quantize.calibration.corpus import read_pieces
from quantize.dist.manifest import MANIFEST_NAME, read_manifest
from quantize.errors import CalibrationError, GgufError, RecipeError, ReleaseError, SourceError
from quantize.formats.gguf_reader import open_gguf
from quantize.formats.safetensors_header import read_header
from quantize.gguf.imatrix import Importance, read_importance, write_importance
from quantize.publishing.finished import files_of
from quantize.publishing.prompt import prompt_template
from quantize.publishing.source_card import front_matter, source_card, texts_of
from quantize.recipe import load_recipe
from quantize.recipe.schema import Corpus
from quantize.source import checkpoint
from quantize.source.resolved import safe_name

Command = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = "model: {source: org/name}\ngptq: {variants: [{bits: 4}]}\n"
LONG = "a" * 5000
HEX = "0x" + "f" * 9000  # YAML reads it, but Python refuses to print it


# -- recipes

RECIPES = {
    "tag of a word": ("release: {owner: !!bool foo}", "is not a valid value for its tag bool"),
    "tag of a date": ("release: {owner: !!timestamp foo}", "is not a valid value for its tag timestamp"),
    "tag of nothing": ("release: {owner: !!int ''}", "is not a valid value for its tag int"),
    "python tag": ("release: {owner: !!python/name:os.abort ''}", "could not determine a constructor"),
    "huge number": (f"calibration: {{samples: {HEX}}}", "more than 64 bits"),
    "huge base 60": (f"calibration: {{samples: {'1:' * 3000}1}}", "more than 64 bits"),
    "huge base 60 float": (f"calibration: {{samples: {'1:' * 3000}1.5}}", "is not a valid value for its tag float"),
    "half a character": ('release: {quantized_by: "a\\ud800"}', "half of a character"),
    "half a character as key": ('"a\\udfff": 1', "half of a character"),
    "two lines as a name": ('release: {quantized_by: "a\\n# b"}', "must be one line"),
    "too deep": ("x: " + "[" * 40 + "]" * 40, "is nested too deeply"),
    "long extends": (f"extends: {LONG}", "no recipe file"),
    "endless extends": ("extends: /dev/zero", "no recipe file '/dev/zero'"),
    "regex that repeats": (
        "gguf: {levels: Q4_0, tensor_types: {'a{9999999999999}': Q4_0}}",
        "is not a regular expression",
    ),
    "owner that the hub refuses": ("release: {owner: a-}", "must be a hub name"),
    "repo that the hub refuses": ("release: {repo: 'a/x--{METHOD}'}", "is not a hub repo name"),
    "repo like a git folder": ("release: {repo: 'a/{METHOD}.git'}", "is not a hub repo name"),
    "many variants": ("awq: {variants: [" + "{}," * 300 + "]}", "a release has at most 256"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_one_sentence(name: str, tmp_path: Path) -> None:
    text, message = RECIPES[name]
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + text + "\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize(
    "override",
    ["gptq.variants.²=1", f"gptq.variants.{'9' * 5000}=1", "model.source" + ".a" * 3000 + "=1",
     "gptq.variants=" + "[" * 99],
    ids=["digit that is no number", "huge index", "deep path", "deep value"],
)  # fmt: skip
def test_a_hostile_override_is_one_sentence(override: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source", [LONG, "./" + LONG, "~nobody-of-this-name/x", "a--b/c", "a/b.git", "package:", "é/é"]
)
def test_a_source_that_is_no_name_of_anything(invoke: Command, tmp_path: Path, source: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    result = invoke("plan", path, "--dist", tmp_path / "dist", "--set", f"model.source={json.dumps(source)}")
    assert_refused(result)
    assert not (tmp_path / "dist").exists()


def test_a_long_chain_of_recipes_ends(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"r{number}.yaml").write_text(f"extends: r{number + 1}.yaml\n")
    (tmp_path / "r50.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match="more than 16 recipes that extend each other"):
        load_recipe(tmp_path / "r0.yaml")


@given(place=st.integers(0, 400), data=st.binary(max_size=12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_recipe_with_foreign_bytes_loads_or_is_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    text = (RECIPE + "awq: {matrix: {group_size: [32, 64]}}\ncalibration: {dataset: pydoc, samples: 4}\n").encode()
    path.write_bytes(text[: place % len(text)] + data + text[place % len(text) :])
    try:
        message = load_recipe(path).name
    except RecipeError as error:
        message = str(error)
    assert message.isprintable()


@given(name=st.text(max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_name_from_outside_stays_one_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe not in {"", ".", ".."}
    assert not {"/", "\\", "\0", "\n"} & set(safe)
    assert "--" not in safe
    assert not safe.startswith((".", "-"))


# -- safetensors


def safetensors(table: Any, data: int = 64, length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * data


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


def parsed(data: bytes) -> Any:
    return read_header(lambda first, last: data[first:last])


WHOLE = safetensors(entry())
HEADERS = {
    "empty": b"",
    "length 0": safetensors(entry(), length=0),
    "length -1": safetensors(entry(), length=2**64 - 1),
    "length beyond the file": safetensors(entry(), length=99_999_999),
    "no object": safetensors([1]),
    "entry that is no object": safetensors({"w": 5}),
    "deep": safetensors(b'{"w":' + b"[" * 100_000),
    "a name twice": safetensors(json.dumps(entry())[:-1].encode() + b"," + json.dumps(entry())[1:].encode()),
    "negative offset": safetensors(entry(data_offsets=[-4, 60])),
    "reversed offsets": safetensors(entry(data_offsets=[64, 0])),
    "three offsets": safetensors(entry(data_offsets=[0, 1, 64])),
    "float offset": safetensors(entry(data_offsets=[0.0, 64.0])),
    "infinite offset": safetensors(entry(data_offsets=[0, float("inf")])),
    "gap": safetensors(entry(data_offsets=[8, 72])),
    "overlap": safetensors({**entry(), "v": entry()["w"]}),
    "true as a length": safetensors(entry(shape=[True, 16])),
    "negative shape": safetensors(entry(shape=[-4, -4])),
    "shape that overflows": safetensors(entry(shape=[2**62, 2**62])),
    "endless shape": safetensors(entry(shape=[1] * 100_000 + [16])),
    "text as a shape": safetensors(entry(shape="44")),
    "shape of other bytes": safetensors(entry(shape=[4, 5])),
    "list as a dtype": safetensors(entry(dtype=["F32"])),
    "half a character as a name": safetensors({"w\ud800": entry()["w"]}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_false_safetensors_header_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parsed(HEADERS[name])
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(SourceError, match="is truncated or damaged"):
        checkpoint.read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=json_values, extra=json_values)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_safetensors_header_is_read_or_refused(key: str, value: Any, extra: Any) -> None:
    try:
        header = parsed(safetensors({**entry(**{key: value}), "x": extra}))
    except ValueError:
        return
    assert all(first <= last for first, last in header.places.values())


@pytest.mark.parametrize(
    "shard", ["", ".", "..", "../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\ud800", LONG, None, [1]]
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(SourceError) as caught:
        checkpoint.read_checkpoint(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 10, "5", '{"model_type": ["llama"]}', "\ufeff{}"])
def test_a_config_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SourceError):
        checkpoint.read_checkpoint(tmp_path)


def test_a_file_that_no_release_can_hold_is_named(tmp_path: Path) -> None:
    for name in ("LICENSE", "a\nb"):
        (tmp_path / name).write_text("x")
    with pytest.raises(SourceError, match="its name is not valid in a release"):
        checkpoint.non_weight_files(tmp_path)


# -- GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(keys: list[bytes] = [], tensors: list[bytes] = [], counts: tuple[int, int] | None = None) -> bytes:  # noqa: B006
    many, known = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", 3, many, known) + b"".join([*keys, *tensors])


def tensor(name: str = "w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind: int, count: int) -> bytes:
    return text("a.b") + struct.pack("<IIQ", 9, kind, count)


LICENCE = text("general.license") + struct.pack("<I", 8) + text("mit")
SOUND = gguf([LICENCE], [tensor()]).ljust(128, b"\0")[:128] + b"\0" * 16
GGUFS = {
    "another version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "endless keys": gguf(counts=(0, 2**60)),
    "endless tensors": gguf(counts=(2**60, 0)),
    "endless array": gguf([array(0, 2**60)]),  # the package alone reads this for ever
    "array beyond the file": gguf([array(10, 1_000_000)]),
    "array of arrays": gguf([array(9, 3)]),
    "endless text": gguf([struct.pack("<Q", 2**62)]),
    "text that is no UTF-8": gguf([text("a") + struct.pack("<IQ", 8, 1) + b"\xff"]),
    "unknown type of a value": gguf([text("a") + struct.pack("<I", 77)]),
    "alignment 0": gguf([text("general.alignment") + struct.pack("<II", 4, 0)]),
    "alignment 3": gguf([text("general.alignment") + struct.pack("<II", 4, 3)]),
    "a key twice": gguf([LICENCE, LICENCE]),
    "a tensor twice": gguf([], [tensor(), tensor()]) + b"\0" * 64,
    "no dimensions": gguf([], [tensor(shape=())]),
    "many dimensions": gguf([], [tensor(shape=(1,) * 9)]),
    "length 0": gguf([], [tensor(shape=(0,))]),
    "shape that overflows": gguf([], [tensor(shape=(2**62, 2**62))]),
    "offset beyond the file": gguf([], [tensor(offset=2**63)]),
    "ragged blocks": gguf([], [tensor(shape=(33,), kind=2)]) + b"\0" * 64,
    "unknown type of a tensor": gguf([], [tensor(kind=1234)]) + b"\0" * 64,
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_false_gguf_is_refused_everywhere(name: str, tmp_path: Path, invoke: Command) -> None:
    path = tmp_path / "model-Q4_0.gguf"
    path.write_bytes(GGUFS[name])
    with pytest.raises(ValueError, match=r"\w"):
        open_gguf(path)
    with pytest.raises(GgufError, match="is not a GGUF importance matrix"):
        read_importance(path)
    found = invoke("lint", tmp_path)
    assert found.returncode == 3
    assert "[gguf-damaged]" in found.stdout
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    planned = invoke("plan", recipe, "--dist", tmp_path / "dist", "--set", f"model.source={path}")
    assert_refused(planned, "model-Q4_0.gguf")


def test_a_gguf_cut_anywhere_in_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(SOUND)
    assert [tensor.name for tensor in open_gguf(path).tensors] == ["w"]
    for length in range(len(gguf([LICENCE], [tensor()]))):
        path.write_bytes(SOUND[:length])
        with pytest.raises(ValueError, match=r"\w"):
            open_gguf(path)


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -5.0])
def test_an_importance_matrix_with_odd_counts_is_refused(tmp_path: Path, count: float) -> None:
    import numpy as np

    path = tmp_path / "imatrix.gguf"
    write_importance(path, Importance({"w": np.full((1, 8), 7.5, np.float32)}, {"w": np.array([12345])}, "text", 1, 8))
    assert read_importance(path).counts["w"].tolist() == [12345]
    data = path.read_bytes()
    assert data.count(struct.pack("<f", 12345)) == 1
    path.write_bytes(data.replace(struct.pack("<f", 12345), struct.pack("<f", count)))
    with pytest.raises(GgufError, match=r"imatrix\.gguf"):
        read_importance(path)


# -- cards

TEMPLATES = {
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{prompt}",
    "giant text": "{{ 'a' * 10 ** 10 }}{prompt}",
    "giant format": "{{ '%9999999999d' % 1 }}{prompt}",
    "giant number": "{{ 10 ** (10 ** 10) }}{prompt}",
    "python's objects": "{{ ''.__class__.__mro__[1].__subclasses__() }}{prompt}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}{prompt}",
    "file": "{% include '/etc/passwd' %}{prompt}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}{prompt}",
    "half a character": "{prompt}\ud800",
    "an object's address": "{{ cycler('a') }}{{ messages[0].content }}",
    "a macro's address": "{% macro m() %}{% endmacro %}{{ m }}{{ messages[0].content }}",
    "a generator's address": "{{ messages | map('upper') }}{{ messages[0].content }}",
    "an address by a filter": "{{ range | string }}{{ messages.pop | string }}{{ messages[0].content }}",
    "an object in a list": "{{ [messages.index] }}{{ messages[0].content }}",
    "a namespace": "{{ namespace(a=1) }}{{ messages[0].content }}",
    "the loop": "{% for m in messages %}{{ loop }}{{ m.content }}{% endfor %}",
    "the end of an address": "{{ (messages.index | string)[-9:-3] }}{{ messages[0].content }}",
    "chance": "{{ range(99999) | random }}{{ range(99999) | random }}{{ messages[0].content }}",
    "blind text": "{{ lipsum(n=1) }}{{ messages[0].content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_counts_as_none(name: str, tmp_path: Path) -> None:
    template = TEMPLATES[name].replace("CANARY", str(tmp_path / "canary"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert prompt_template(tmp_path) is None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("settings", ['{"chat_template": [5, {"name": "default"}]}', "[" * 100_000, "[]", "\ufeff"])
def test_odd_tokenizer_settings_have_no_chat_template(tmp_path: Path, settings: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    assert prompt_template(tmp_path) is None


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "front",
    [BOMB, "a: !!bool x", "a: !!timestamp x", "a: !!int ''", "a: !!python/object/apply:os.abort []", "[" * 5000,
     "a: " + "b" * 200_000],
    ids=["merge bomb", "tag", "date", "number", "python", "deep", "long"],
)  # fmt: skip
def test_hostile_front_matter_counts_as_none(front: str) -> None:
    assert front_matter(f"---\n{front}\n---\nbelow") == (None, "below")


def bomb(leaf: str = "[x,x,x,x,x,x,x,x,x,x]") -> str:
    """A card whose every key is ten billion values by its aliases."""
    lines = [f"a: &a {leaf}"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]")
    return "\n".join(lines)


KEYS = ("library_name", "base_model", "license", "license_name", "pipeline_tag", "base_model_relation", "tags")


@pytest.mark.parametrize("leaf", ["[x,x,x,x,x,x,x,x,x,x]", "{x: 1}", "x"])
def test_front_matter_of_aliases_counts_as_none(leaf: str) -> None:
    assert front_matter(f"---\n{bomb(leaf)}\nlicense: mit\n---\nbelow") == (None, "below")
    assert front_matter("---\na: &a [*a]\n---\nbelow") == (None, "below")
    assert front_matter("---\na: &a [x, y]\nb: *a\n---\n")[0] == {"a": ["x", "y"], "b": ["x", "y"]}


def test_a_card_of_aliases_is_a_finding_of_lint(run_quantize: Command, tmp_path: Path) -> None:
    for number, key in enumerate(KEYS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(f"---\n{bomb()}\n{key}: *i\n---\n# x\n")
    result = run_quantize("lint", tmp_path, "--json", "--source", tmp_path / "0")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    found = [{finding["check"] for finding in report["findings"]} for report in json.loads(result.stdout)]
    assert len(found) == len(KEYS)
    assert all("card-metadata" in checks for checks in found)


def test_what_a_stranger_writes_is_shown_shortly(invoke: Command, tmp_path: Path) -> None:
    long, deep = "x" * 2_000_000, {"a": [[[[["y" * 100] * 100] * 100]]]}
    for number, value in enumerate([long, deep, [long] * 3, 10**4000, HEX]):
        folder = tmp_path / str(number)
        folder.mkdir()
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "version": value, "sym": value}
        config = {
            "dtype": value, "torch_dtype": 1, "rope_theta": value, "rope_parameters": {"rope_theta": 5},
            "quantization_config": quantization, "auto_map": {"A": value}, "_name_or_path": f"/{long}",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "quantize_config.json").write_text(json.dumps({"sym": 1, "model_file_base_name": long}))
        index = {"weight_map": {"w": value, "v": f"{long}.safetensors"}, "metadata": [value]}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        links = "".join(f"[{place}](file{place}.txt)" for place in range(5000))
        (folder / "README.md").write_text(f"---\nlibrary_name: {json.dumps(value)}\nlicense: {HEX}\n---\n{links}")
        (folder / MANIFEST_NAME).write_text(json.dumps({"schema": 1, "files": {long: {}}, "loads_in": {"a": long}}))
    result = invoke("lint", tmp_path)
    assert "Traceback" not in result.stderr
    assert max(map(len, result.stdout.splitlines())) < 1200
    assert len(result.stdout.splitlines()) < 5 * 150
    assert "the same of 4,900 more" in result.stdout


def test_a_source_card_may_be_a_bomb_of_aliases_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text('---\na: &a [x, x]\ntags: [*a, *a, y, "\\ud800"]\n---\n' + "z" * 3_000_000)
    front, body = source_card(tmp_path)
    assert texts_of(front, "tags") == ["y"]
    assert len(body) < 300_000
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/dev/zero")
    assert source_card(tmp_path) == ({}, "")


@pytest.mark.parametrize("template", ["{% for i in range(10 ** 9) %}{% endfor %}", "{{ 1 / 0 }}", "{{ ''.__class__ }}"])
def test_a_failing_template_of_ones_own_is_one_sentence(
    invoke: Command, tiny_recipe: Path, tmp_path: Path, template: str
) -> None:
    (tmp_path / "gptq.md.j2").write_text(template)
    options = ["--dist", tmp_path / "dist", "--set", f"release.templates={tmp_path}", "--print", "gptq"]
    assert_refused(invoke("card", tiny_recipe, *options), "release.templates: gptq.md.j2 cannot be rendered")


def test_a_prompt_template_cannot_leave_its_block(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    wish = 'model.prompt_template="{prompt}\\n```\\n# Not mine"'
    card = invoke("card", tiny_recipe, "--dist", tmp_path / "dist", "--set", wish, "--print", "gptq").stdout
    assert "\n````\n{prompt}\n```\n# Not mine\n````\n" in card


# -- manifests and links in dist


def change(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FILE = {"bytes": 1, "sha256": "0" * 64}
MANIFESTS: dict[str, dict[str, Any]] = {
    "file outside": {"files": {"../../../canary": FILE}},
    "file from the root": {"files": {"/etc/passwd": FILE}},
    "files that are a list": {"files": [1]},
    "file without bytes": {"files": {"config.json": {}}},
    "bytes that are text": {"files": {"config.json": {**FILE, "bytes": "1"}}},
    "ledger of numbers": {"ledger": [1]},
    "ledger without errors": {"ledger": [{"module": "a"}]},
    "ledger that is a text": {"ledger": "x"},
    "inputs that are a list": {"key_inputs": [1]},
    "quality without figures": {"quality": {"key": "a"}},
    "levels outside": {"levels": {"Q4_0": {"files": {"../x.gguf": FILE}}}},
    "levels of null": {"levels": {"Q4_0": None}},
    "escape sequence": {"ledger": [{"module": "\x1b[2J", "outcome": "x", "dead_columns": 0, "relative_error": 0.1}]},
    "loads in a list": {"loads_in": ["x"]},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_unsound_manifest_counts_as_none(name: str, invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    branch, canary = dist / "tiny-llama-GPTQ" / "main", dist.parent / "canary"
    canary.write_text("untouched")
    change(branch, **MANIFESTS[name])
    assert read_manifest(branch) is None
    for command in ("status", "explain", "plan"):
        shown = invoke(command, tiny_recipe, "--dist", dist)
        assert shown.returncode == 0, shown.stderr
        assert "\x1b" not in shown.stdout
    assert_refused(invoke("git", tiny_recipe, "--dist", dist, "--out", dist.parent / "git"), "gptq/main: stale")
    linted = invoke("lint", branch)
    assert f"{MANIFEST_NAME}: is not a valid manifest" in linted.stdout
    checked = invoke("verify", branch, "--no-load")
    assert checked.returncode == 3
    assert f"{MANIFEST_NAME} is not a valid manifest" in checked.stdout
    assert canary.read_text() == "untouched"


def test_a_branch_that_is_a_link_out_of_dist_is_refused(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    branch, outside = dist / "tiny-llama-GPTQ" / "main", dist.parent / "outside"
    branch.rename(outside)
    branch.symlink_to(outside)
    before = contents(outside)
    for command in ("card", "build", "status"):
        assert_refused(invoke(command, tiny_recipe, "--dist", dist), "is a link that leads out of")
    assert contents(outside) == before


def linked(name: str, target: str) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target.format(secret=model.parent / "secret"))

    return plant


def through_a_folder(model: Path) -> None:
    """README.md -> inner/../../secret/notes.md, where ``inner`` is itself a link."""
    (model / "deep" / "deeper").mkdir(parents=True)
    (model / "inner").symlink_to("deep/deeper")
    (model / "README.md").unlink()
    (model / "README.md").symlink_to("inner/../../../secret/README.md")


def false_cache(model: Path) -> None:
    """A folder called as the hub's cache calls its blobs, beside the model."""
    blobs = model.parent / "blobs"
    (model.parent / "secret").rename(blobs)
    (model / "token").symlink_to(blobs / "token")


def pipe(name: str) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return plant


def socket_file(model: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        where = os.getcwd()
        os.chdir(model)  # a socket's path may be short only
        server.bind("NOTICE")
        os.chdir(where)


CARRIED = ("README.md", "LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "model.safetensors", "model.safetensors.index.json", "chat_template.jinja")  # fmt: skip
STRAYS: dict[str, Callable[[Path], None]] = {
    **{f"link at {name}": linked(name, "{secret}/" + name) for name in CARRIED},
    "the same name": linked("token", "{secret}/token"),
    "a relative link": linked("NOTICE", "../secret/token"),
    "a link to the root": linked("NOTICE", "/etc/hostname"),
    "a folder": linked("additional_chat_templates", "{secret}"),
    "a file in a folder": linked("sub/token", "../../secret/token"),
    "through a folder": through_a_folder,
    "a link to a link": linked("a", "../hop"),
    "a folder called blobs": false_cache,
    "nowhere": linked("NOTICE", "{secret}/nothing"),
    "in a circle": linked("NOTICE", "NOTICE"),
    "a device": linked("README.md", "/dev/zero"),
    **{f"pipe at {name}": pipe(name) for name in CARRIED},
    "a pipe in a folder": lambda model: (model / "sub").mkdir() or os.mkfifo(model / "sub" / "NOTICE"),
    "a socket": socket_file,
}


@pytest.fixture
def strayed(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model of one's own, beside a folder of secrets that are named as its files are."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    shutil.copytree(tiny_llama, tmp_path / "secret")
    for name in ("token", "chat_template.jinja"):
        (tmp_path / "secret" / name).write_text("hf_SECRET")
    (tmp_path / "hop").symlink_to(tmp_path / "secret" / "token")
    (tmp_path / "secret" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    return model


@pytest.mark.parametrize("name", STRAYS)
def test_a_source_is_read_from_its_own_folder_only(name: str, invoke: Command, strayed: Path, tmp_path: Path) -> None:
    STRAYS[name](strayed)
    recipe = write_recipe(tmp_path / "r.yaml", strayed)
    for command in (["plan"], ["build", "--device", "cpu"]):
        refused = invoke(command[0], recipe, "--dist", tmp_path / "dist", *command[1:])
        assert_refused(refused, strayed)
        assert re.search(r"is a link|no regular file|has no config|is missing", refused.stderr), refused.stderr
    assert not list((tmp_path / "dist").glob("*/*/*"))


@pytest.mark.parametrize("name", [name for name in STRAYS if name not in {"a relative link", "in a circle"}])
def test_lint_and_verify_read_a_branch_from_its_own_folder_only(name: str, invoke: Command, strayed: Path) -> None:
    (strayed / "tokenizer.json").write_text('{"model": {"vocab": {"hf_SECRET": 999}}}')
    STRAYS[name](strayed)
    found = invoke("lint", strayed)
    assert found.returncode != 0
    assert "[stray]" in found.stdout
    checked = invoke("verify", strayed, "--no-load")
    assert checked.returncode != 0
    assert "failed   files: " in checked.stdout


def test_a_file_without_end_is_not_carried_over(invoke: Command, strayed: Path, tmp_path: Path) -> None:
    os.truncate(strayed / "LICENSE", 10**12)  # a hole, which takes no room
    recipe = write_recipe(tmp_path / "r.yaml", strayed)
    assert_refused(invoke("plan", recipe, "--dist", tmp_path / "dist"), "LICENSE", "has 1000 GB")


def test_links_that_stay_inside_are_fine(invoke: Command, tiny_llama: Path, strayed: Path, tmp_path: Path) -> None:
    (strayed / "files").mkdir()
    for name in ("LICENSE", "README.md", "tokenizer.json"):
        (strayed / name).rename(strayed / "files" / name)
        (strayed / name).symlink_to(f"files/{name}")
    (strayed / ".cache").symlink_to(tmp_path / "secret")  # hidden files are no part of a model
    recipe = write_recipe(tmp_path / "r.yaml", strayed)
    assert invoke("plan", recipe, "--dist", tmp_path / "dist").returncode == 0


def cached(tiny_llama: Path, home: Path) -> Path:
    """A snapshot as the hub's client keeps it: links into the blobs of its repo."""
    blobs, snapshot = home / "models--org--tiny" / "blobs", home / "models--org--tiny" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_llama.iterdir())):
        shutil.copy(path, blobs / f"{number:040d}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040d}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_may_link_into_its_own_repo_only(
    invoke: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    ours, theirs = cached(tiny_llama, tmp_path / "hub"), cached(tiny_llama, tmp_path / "other")
    recipe = write_recipe(tmp_path / "r.yaml", ours)
    assert invoke("plan", recipe, "--dist", tmp_path / "dist").returncode == 0
    assert "[stray]" not in invoke("lint", ours).stdout
    (tmp_path / "hub" / "models--me--private").mkdir()
    shutil.copytree(theirs.parent.parent / "blobs", tmp_path / "hub" / "models--me--private" / "blobs")
    (ours / "NOTICE").symlink_to(f"../../../models--me--private/blobs/{0:040d}")
    assert_refused(invoke("plan", recipe, "--dist", tmp_path / "dist"), "NOTICE", "is a link to")


def test_a_rebuild_follows_no_link_out_of_a_strangers_release(invoke: Command, dist: Path, tmp_path: Path) -> None:
    folder = dist / "tiny-llama-GPTQ" / "main"
    (folder / MANIFEST_NAME).rename(tmp_path / "elsewhere.json")
    (folder / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere.json")
    refused = invoke("rebuild", folder)
    assert refused.returncode != 0
    assert "no manifest that can be read" in refused.stderr
    (folder / MANIFEST_NAME).unlink()
    os.mkfifo(folder / MANIFEST_NAME)
    assert invoke("rebuild", folder).returncode != 0


def test_a_link_out_of_a_branch_is_not_given_away(dist: Path) -> None:
    branch = dist / "tiny-llama-GPTQ" / "main"
    assert "config.json" in files_of(branch)
    (dist / "secret").write_text("not yours")
    (branch / "NOTICE").symlink_to(dist / "secret")
    with pytest.raises(ReleaseError, match="NOTICE: is a link to outside its branch"):
        files_of(branch)


def test_prune_follows_no_link(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    repo, outside = dist / "tiny-llama-GPTQ", dist.parent / "outside"
    (repo / "main").rename(outside)
    (repo / "old").symlink_to(outside)
    before = contents(outside)
    pruned = invoke("prune", tiny_recipe, "--dist", dist, "--where", "dist", "--yes")
    assert pruned.returncode == 0, pruned.stderr
    assert "nothing to prune" in pruned.stdout
    assert contents(outside) == before


# -- lint and calibration texts

CONFIGS: dict[str, dict[str, Any]] = {
    "group size 0": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}},
    "theta that is a list": {"rope_parameters": {"rope_theta": [1]}, "quantization_config": []},
    "bits that are true": {"quantization_config": {"quant_method": "gptq", "bits": True, "group_size": 32}},
    "method that is a list": {"quantization_config": {"quant_method": [1], "bits": {}, "group_size": None}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_odd_config_is_a_finding_for_lint_and_verify(
    name: str, invoke: Command, dist: Path, tiny_llama: Path
) -> None:
    branch = dist / "tiny-llama-GPTQ" / "main"
    data = json.loads((branch / "config.json").read_text())
    (branch / "config.json").write_text(json.dumps({**data, **CONFIGS[name]}))
    assert invoke("lint", branch).returncode in {0, 3}
    checked = invoke("verify", branch, "--no-load", "--source", tiny_llama)
    assert checked.returncode == 3
    assert "failed   tensors" in checked.stdout or "failed   hashes" in checked.stdout


def test_a_card_cannot_overflow_or_steer_lint(invoke: Command, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    table = f"| Name | Size |\n| - | - |\n| model.safetensors | 1.{'0' * 400} GB |\n| main | {'9' * 400} GB |\n"
    front = 'base_model: a/b\nlibrary_name: "\\e[2J\\nforged: error"'
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n{table}[x](\x1b[31m)\n")
    found = invoke("lint", tmp_path)
    assert found.returncode == 3
    assert "\x1b" not in found.stdout
    assert not [line for line in found.stdout.splitlines() if line.startswith("forged")]


@pytest.mark.parametrize("target", ["a--b/c", "a/b.git", "~nobody-of-this-name/x", LONG, "a/\u00e9"])
def test_a_target_that_is_no_name_of_anything(invoke: Command, target: str) -> None:
    assert_refused(invoke("lint", target))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": "\\ud800"}', '{"text": 5}', "NaN", '["text"]'])
def test_a_hostile_row_of_a_calibration_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=r"rows\.jsonl:2: "):
        list(read_pieces(Corpus(file=str(path))))
