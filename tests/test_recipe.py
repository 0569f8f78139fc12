"""Recipes: the shipped ones, expansion, inheritance, overrides, and one clear sentence for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.errors import RecipeError
from quantize.recipe import LoadedRecipe, load_recipe
from quantize.recipe.schema import Recipe
from quantize.recipe.shipped import shipped_recipes

FOLDER = Path(__file__).parent / "recipes"
BAD = sorted(path.name for path in FOLDER.glob("bad-*.yaml"))
EXPECT = "# expect: "
MODEL = "model: {source: org/name}\n"
PUBLISHED = [
    "main",
    "gptq-4bit-64g-actorder_True",
    "gptq-4bit-32g-actorder_True",
    "gptq-4bit-128g-actorder_True",
    "gptq-8bit-64g-actorder_True",
    "gptq-8bit-128g-actorder_True",
    "gptq-8bit-128g-actorder_False",
    "gptq-8bit--1g-actorder_True",
]


def load(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def branches(loaded: LoadedRecipe) -> list[str | None]:
    return [variant.branch for variant in loaded.recipe.gptq.variants]


# -- shipped


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_by_its_name(name: str) -> None:
    loaded = load_recipe(name)
    assert len(set(branches(loaded))) == len(loaded.recipe.gptq.variants) > 0


@pytest.mark.parametrize("name", ["gptq-8-branches", "examples/airoboros-l2-13b-gpt4-m2.0"])
def test_the_set_of_eight_has_the_published_branches(name: str) -> None:
    assert branches(load_recipe(name)) == PUBLISHED


# -- expansion


def test_matrix_expands_to_every_combination(tmp_path: Path) -> None:
    loaded = load(tmp_path, MODEL + "gptq:\n  matrix: {bits: [4, 8], group_size: [32, -1], desc_act: [true]}\n")
    found = [(item.bits, item.group_size, item.desc_act) for item in loaded.recipe.gptq.variants]
    assert found == [(4, 32, True), (4, -1, True), (8, 32, True), (8, -1, True)]
    assert branches(loaded) == ["main", *(f"gptq-{bits}bit-{size}g-actorder_True" for bits, size, _ in found[1:])]


def test_matrix_does_not_repeat_an_explicit_variant(tmp_path: Path) -> None:
    body = "gptq:\n  variants: [{branch: mine, bits: 4, group_size: 64}]\n  matrix: {bits: [4, 8], group_size: [64]}\n"
    assert branches(load(tmp_path, MODEL + body)) == ["mine", "gptq-8bit-64g-actorder_False"]


def test_defaults_reach_variants_that_say_nothing_else(tmp_path: Path) -> None:
    body = "gptq: {damp_percent: 0.01, sym: false, variants: [{bits: 3}, {bits: 8, sym: true, damp_percent: 0.2}]}\n"
    first, second = load(tmp_path, MODEL + body).recipe.gptq.variants
    assert (first.damp_percent, first.sym, first.group_size) == (0.01, False, 128)
    assert (second.damp_percent, second.sym) == (0.2, True)


@pytest.mark.parametrize(
    ("variant", "branch"),
    [
        ("{desc_act: static}", "gptq-4bit-128g-actorder_static"),
        ("{sym: false}", "gptq-4bit-128g-actorder_False-asym"),
        ("{damp_percent: 0.01}", "gptq-4bit-128g-actorder_False-damp_0.01"),
        ("{mse: false, bits: 3}", "gptq-3bit-128g-actorder_False-mse_False"),
    ],
)
def test_unusual_parameters_show_in_the_branch_name(tmp_path: Path, variant: str, branch: str) -> None:
    body = f"gptq:\n  variants: [{{branch: main, bits: 8}}, {variant}]\n"
    assert branches(load(tmp_path, MODEL + body)) == ["main", branch]


def test_paths_are_relative_to_the_file_they_are_written_in(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = load(tmp_path, "model: {source: model}\ncalibration: {dataset: ./t.txt}\ngptq: {variants: [{bits: 4}]}\n")
    assert recipe.recipe.model.source == str(tmp_path / "model")
    assert recipe.recipe.calibration.dataset[0].file == str(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5_000_000_000), ("2.5 MB", 2_500_000), ("1T", 10**12), ("7000000", 7_000_000)]
)
def test_sizes_are_read_as_people_write_them(tmp_path: Path, size: str, count: int) -> None:
    text = MODEL + f"release: {{max_shard_size: '{size}'}}\ngptq: {{variants: [{{bits: 4}}]}}\n"
    assert load(tmp_path, text).recipe.release.max_shard_size == count


# -- extends


def test_extends_merges_key_by_key_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        MODEL + "calibration: {samples: 7, seed: 3}\ngptq: {bits: 8, variants: [{group_size: 64}, {group_size: 32}]}\n"
    )
    body = "extends: base.yaml\ncalibration: {samples: 9}\ngptq: {variants: [{group_size: 16}]}\n"
    recipe = load(tmp_path, body).recipe
    assert (recipe.calibration.samples, recipe.calibration.seed) == (9, 3)
    assert [(item.bits, item.group_size) for item in recipe.gptq.variants] == [(8, 16)]


def test_extends_takes_a_shipped_name(tmp_path: Path) -> None:
    loaded = load(tmp_path, "extends: gptq-8-branches\nmodel: {source: me/mine}\n")
    assert branches(loaded) == PUBLISHED
    assert loaded.recipe.model.source == "me/mine"


def test_a_mistake_in_the_extended_recipe_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MODEL + "gptq:\n  variants:\n    - {bits: 6}\n")
    with pytest.raises(RecipeError, match=r"base\.yaml:4: gptq\.variants\[0\]\.bits: "):
        load(tmp_path, "extends: base.yaml\n")


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: recipe.yaml\n")
    with pytest.raises(RecipeError, match=r"other\.yaml:1: extends: 'recipe\.yaml' extends this recipe in turn"):
        load(tmp_path, "extends: other.yaml\n")


# -- --set


def test_set_overrides_scalars_list_entries_and_new_sections(tmp_path: Path) -> None:
    text = MODEL + "gptq: {variants: [{bits: 4}, {bits: 8}]}\n"
    overrides = ["gptq.damp_percent=0.02", "gptq.variants.1.bits=3", "calibration.samples=5"]
    recipe = load(tmp_path, text, *overrides).recipe
    assert [item.bits for item in recipe.gptq.variants] == [4, 3]
    assert [item.damp_percent for item in recipe.gptq.variants] == [0.02, 0.02]
    assert recipe.calibration.samples == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gptq.bits", "must have the form key.path=value"),
        ("=4", "must have the form key.path=value"),
        ("gptq..bits=4", "must have the form key.path=value"),
        ("gptq.bits=5", "gptq.bits: must be one of 2, 3, 4, 8, not 5"),
        ("gptq.bitz=4", "gptq.bitz: unknown key; did you mean 'bits'?"),
        ("gptq.variants.7.bits=4", "gptq.variants has entries 0 to 0, not '7'"),
        ("gptq.variants.x.bits=4", "gptq.variants has entries 0 to 0, not 'x'"),
        ("gptq.bits=[", "is not valid YAML"),
        ("model.name=a: b", "is not valid YAML"),
    ],
)
def test_a_bad_override_names_itself(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, MODEL + "gptq: {variants: [{group_size: 64}]}\n", override)
    assert str(caught.value).startswith(f"--set {override}")
    assert message in str(caught.value)


# -- mistakes


@pytest.mark.parametrize("name", BAD)
def test_each_mistake_gives_its_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    expected = Path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix(EXPECT)
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    place = "" if re.match(r"bad-[a-z-]+\.yaml:", expected) else f"{name}:"
    assert str(caught.value) == place + expected


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RecipeError):
        load(tmp_path, MODEL + f"gptq: !!python/object/apply:pathlib.Path.mkdir ['{target}']\n")
    assert not target.exists()


def test_a_missing_recipe_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file; `quantize recipes` lists"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"model: \xff\xfe\n", r"is not UTF-8 text \(byte 7\)"),
        (b"#" * 100_001, "is larger than 100,000 bytes"),
        (b"model: " + b"[" * 1500 + b"]" * 1500, "is nested too deeply"),
        (b"model: \x00\n", "is not valid YAML"),
        (b"calibration: {seed: " + b"9" * 5000 + b"}\n", "is not a valid value"),
        (
            b"model: {source: a/b}\ngptq: {}\nrelease: {max_shard_size: '" + b"9" * 400 + b"'}\n",
            "must be less than or equal to",
        ),
    ],
    ids=["not-utf8", "too-large", "too-deep", "nul", "huge-number", "huge-size"],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_message_is_one_printable_line_whatever_the_recipe_says(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, MODEL + '"two\\nlines \\e[31m": 1\ngptq: {variants: [{bits: 4}]}\n')
    assert str(caught.value).endswith(r"recipe.yaml:2: two\nlines \x1b[31m: unknown key")


def test_a_message_does_not_repeat_a_long_value(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"model: {{source: {list(range(500))}}}\ngptq: {{variants: [{{bits: 4}}]}}\n")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


# -- anything at all


words = st.sampled_from([
    "model", "source", "revision", "release", "owner", "repo", "max_shard_size", "calibration", "dataset", "samples",
    "sequence_length", "gptq", "variants", "matrix", "bits", "group_size", "desc_act", "damp_percent", "branch",
    "extends", "hub", "file", "preset", "wikitext", "static", "org/name", "..", "~x", "{owner}/{METHOD}", "<<",
])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def assert_loads_or_explains(path: Path, overrides: list[str] | None = None) -> None:
    try:
        loaded = load_recipe(path, overrides or [])
    except RecipeError as error:
        message = str(error)
    else:
        message = "loaded"
        assert isinstance(loaded.recipe, Recipe)
        assert all(branches(loaded))
    assert message
    assert message.isprintable()


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_loads_or_gives_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    assert_loads_or_explains(path)


@given(gptq=trees, other=st.dictionaries(words, trees, max_size=3), extra=trees)
@settings(max_examples=150, deadline=None)
def test_any_data_loads_or_gives_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, gptq: object, other: dict[str, object], extra: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    data = {"model": {"source": "org/name"}, "gptq": {"variants": [{"bits": 4}], "matrix": gptq}, **other}
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    assert_loads_or_explains(path)
    path.write_text(yaml.safe_dump(extra, allow_unicode=True), encoding="utf-8")
    assert_loads_or_explains(path)


@given(override=st.text(max_size=20) | st.tuples(words, words, st.text(max_size=6)).map("{0[0]}.{0[1]}={0[2]}".format))
@settings(max_examples=100, deadline=None)
def test_any_override_loads_or_gives_a_recipe_error(override: str) -> None:
    assert_loads_or_explains(Path("demo"), [override])
