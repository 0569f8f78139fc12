"""Cards: the founding card again, broken sources, the publisher's own parts, prompts, snippets that run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from snippets import run_snippets
from tiny import write_recipe

import quantize
from quantize.formats.safetensors_header import write_hollow
from quantize.formats.tensors import TensorSpec
from quantize.publishing.card import render
from quantize.publishing.prompt import prompt_as_python, prompt_template
from quantize.publishing.source_card import absolute_links, source_card

HUB_ID = "jondurbin/airoboros-l2-13b-gpt4-m2.0"
REPO = "TheBloke/airoboros-l2-13b-gpt4-m2.0-GPTQ"
PUBLISHED = [
    ("main", "4", "128", "No", "7.26 GB", "Yes"),
    ("gptq-4bit-64g-actorder_True", "4", "64", "Yes", "7.51 GB", "Yes"),
    ("gptq-4bit-32g-actorder_True", "4", "32", "Yes", "8.00 GB", "Yes"),
    ("gptq-4bit-128g-actorder_True", "4", "128", "Yes", "7.26 GB", "Yes"),
    ("gptq-8bit-64g-actorder_True", "8", "64", "Yes", "13.95 GB", "No"),
    ("gptq-8bit-128g-actorder_True", "8", "128", "Yes", "13.65 GB", "No"),
    ("gptq-8bit-128g-actorder_False", "8", "128", "No", "13.65 GB", "No"),
    ("gptq-8bit--1g-actorder_True", "8", "None", "Yes", "13.36 GB", "No"),
]
SECTIONS = (
    "Description", "Repositories available", "Prompt template", "Licensing", "Provided files and GPTQ parameters",
    "How to download from branches", "How to use in text-generation-webui", "How to serve with vLLM or TGI",
    "How to use from Python", "Compatibility",
)  # fmt: skip
SOURCE_CARD = """\
---
license: other
datasets:
- jondurbin/airoboros-gpt4-m2.0
---

### Overview

See [the data](data.md), ![a picture](./categories.png), <img src="plot.svg">, [the hub](https://hf.co/x), [up](#top).
"""


def llama_13b(folder: Path) -> Path:
    """Config and headers of a Llama 2 13B; its weights are a hole in the file."""
    width, inner, vocabulary = 5120, 13824, 32000
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, width))
    shapes: dict[str, tuple[int, ...]] = {**tensors, "model.norm.weight": (width,)}
    for block in range(40):
        inside = f"model.layers.{block}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{inside}self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"{inside}mlp.{name}_proj.weight"] = (inner, width)
        shapes[f"{inside}mlp.down_proj.weight"] = (width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{inside}{name}.weight"] = (width,)
    specs = {name: TensorSpec("F16", shape, "model.safetensors") for name, shape in shapes.items()}
    write_hollow(folder / "model.safetensors", specs)
    (folder / "README.md").write_text(SOURCE_CARD)
    (folder / "LICENSE.txt").write_text("Llama 2 community licence\n")
    (folder / "USE_POLICY.md").write_text("Use it well.\n")
    return folder


@pytest.fixture(scope="module")
def founding(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = llama_13b(tmp_path_factory.mktemp("13b") / "airoboros-l2-13b-gpt4-m2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.source.resolved.cached_sha256", lambda path: "0" * 64)  # 26 GB of hole to hash
        loaded = quantize.load_recipe("examples/airoboros-l2-13b-gpt4-m2.0", [f"model.source={folder}"])
        plan = quantize.plan(loaded, quantize.PlanOptions(dist=folder / "dist"))
        source = dataclasses.replace(plan.source, hub_id=HUB_ID, base_model=HUB_ID, commit="abc123")
        return render(dataclasses.replace(plan, source=source), "gptq")


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def table(card: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("| [")
    ]


def test_the_founding_card_has_the_same_rows_sizes_and_links(founding: str) -> None:
    rows = table(founding)
    assert len(rows) == 8
    for row, (branch, bits, group, order, size, exllama) in zip(rows, PUBLISHED, strict=True):
        assert row[0] == f"[{branch}](https://huggingface.co/{REPO}/tree/{branch})"
        assert (row[1], row[2], row[3], row[4], row[6], row[7], row[8]) == (
            bits, group, order, "0.1", "2048", size, exllama,
        )  # fmt: skip
        assert "wikitext" in row[5]
    assert len({row[9] for row in rows}) == 8


def test_the_founding_card_has_every_section_in_order(founding: str) -> None:
    found = re.findall(r"^## (.*)$", founding, re.MULTILINE)
    assert [section for section in found if section in SECTIONS] == list(SECTIONS)
    assert "# Airoboros L2 13B Gpt4 M2.0 - GPTQ" in founding
    assert f"[Jon Durbin](https://huggingface.co/{HUB_ID.split('/')[0]})" in founding
    assert "USER: {prompt} ASSISTANT:" in founding
    assert "`LICENSE.txt`, `USE_POLICY.md`" in founding
    assert "# Original model card: Airoboros L2 13B Gpt4 M2.0" in founding


def test_the_founding_cards_metadata(founding: str) -> None:
    said = front_matter(founding)
    assert said["base_model"] == HUB_ID
    assert said["base_model_relation"] == "quantized"
    assert said["datasets"] == ["jondurbin/airoboros-gpt4-m2.0"]
    assert (said["inference"], said["license"], said["model_type"]) == (False, "other", "llama")
    assert (said["model_creator"], said["model_name"]) == ("Jon Durbin", "Airoboros L2 13B Gpt4 M2.0")
    assert (said["quantized_by"], said["tags"]) == ("TheBloke", ["gptq"])
    assert "{prompt}" in said["prompt_template"]


def test_links_of_the_original_card_lead_to_its_repo(founding: str) -> None:
    base = f"https://huggingface.co/{HUB_ID}"
    assert f"[the data]({base}/blob/abc123/data.md)" in founding
    assert f"![a picture]({base}/resolve/abc123/categories.png)" in founding
    assert f'<img src="{base}/resolve/abc123/plot.svg">' in founding
    assert "[the hub](https://hf.co/x), [up](#top)" in founding


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no front matter at all",
        "---\n",
        "---\ntags: null\nlicense: null\n---\nBody",
        "---\n[1, 2\n---\nBody",
        "---\n- a\n- b\n---\nBody",
        "---\nlicense: {a: 1}\ntags: {b: [2]}\ndatasets: 7\nlanguage: [1, en]\n---\nBody {{ 7 * 7 }} {% raw %}",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\nBody",
        "<div>" * 200_000,
        "\x00\ufffd\u202e --- \n---",
    ],
    ids=[
        "empty",
        "plain",
        "open",
        "null",
        "wrong yaml",
        "list",
        "wrong types",
        "code",
        "1 MB of HTML",
        "odd characters",
    ],
)
def test_a_broken_source_card_breaks_nothing(tiny_recipe: Path, tmp_path: Path, text: str) -> None:
    plan = quantize.plan(quantize.load_recipe(tiny_recipe), quantize.PlanOptions(dist=tmp_path))
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")
    checkpoint = dataclasses.replace(plan.source.checkpoint, folder=folder)
    source = dataclasses.replace(plan.source, checkpoint=checkpoint, remote_hashes=plan.source.hashes)
    card = render(dataclasses.replace(plan, source=source), "gptq")
    assert front_matter(card)["tags"] == ["gptq"]
    assert len(table(card)) == 2
    assert len(card) < 300_000
    body, signature = card.rstrip().rsplit("\n", 1)
    assert signature.startswith("<!-- ")  # a hash, which may hold any digits
    assert "49" not in body.partition("# Original model card")[2]


def test_a_source_without_a_card_has_none() -> None:
    assert source_card(None) == ({}, "")
    assert source_card(Path("/nowhere")) == ({}, "")


def test_links_out_of_the_repo_stay() -> None:
    text = "[a](mailto:x@y.z) [b](//cdn/x.png) [c](/root) <a href='https://x/y'>"
    assert absolute_links(text, "o/n", "main") == text


# -- the publisher's own parts


def test_header_footer_and_templates_of_the_publisher(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "head.md").write_text("Welcome to {{ not a template }}")
    (tmp_path / "foot.md").write_text("## Thanks\n\nTo all patrons.")
    own = tmp_path / "own"
    own.mkdir()
    (own / "_licence.md.j2").write_text("## My licence words for {{ name }}\n\n")
    settings = [f"release.card_header={tmp_path / 'head.md'}", f"release.card_footer={tmp_path / 'foot.md'}"]
    loaded = quantize.load_recipe(tiny_recipe, [*settings, f"release.templates={own}"])
    card = render(quantize.plan(loaded, quantize.PlanOptions(dist=tmp_path)), "gptq")
    assert card.index("Welcome to {{ not a template }}") < card.index("# Tiny - GPTQ")
    assert card.index("To all patrons.") < card.index("# Original model card")
    assert "## My licence words for Tiny" in card
    assert "## Licensing" not in card


@pytest.mark.parametrize(
    "template", ["{{ nothing.like.this }}", "{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"]
)
def test_a_bad_template_is_one_sentence(tiny_recipe: Path, tmp_path: Path, invoke: Command, template: str) -> None:
    (tmp_path / "gptq.md.j2").write_text(template)
    result = invoke("card", tiny_recipe, "--set", f"release.templates={tmp_path}", "--print", "gptq")
    assert result.returncode == 2
    assert "gptq.md.j2 cannot be rendered" in result.stderr
    assert result.stdout == ""


def test_card_alone_writes_cards_and_nothing_else(
    tiny_recipe: Path, dist: Path, tmp_path: Path, invoke: Command
) -> None:
    before = {path: path.read_bytes() for path in dist.rglob("*") if path.is_file()}
    (tmp_path / "foot.md").write_text("A footer.")
    result = invoke("card", tiny_recipe, "--dist", dist, "--set", f"release.card_footer={tmp_path / 'foot.md'}")
    assert result.returncode == 0, result.stderr
    after = {path: path.read_bytes() for path in dist.rglob("*") if path.is_file()}
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {dist / "tiny-llama-GPTQ" / "main" / "README.md"}
    assert invoke("plan", tiny_recipe, "--dist", dist, "--check", "--only", "main").returncode == 0


def test_a_card_of_a_method_that_the_recipe_lacks(tiny_recipe: Path, invoke: Command) -> None:
    result = invoke("card", tiny_recipe, "--print", "awq")
    assert (result.returncode, "has no `awq:` section" in result.stderr) == (2, True)


# -- prompts


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}{{ '!' if add_generation_prompt }}",
         "<user>{prompt}!"),
        ("{{ bos_token }}[INST] {{ messages[0].content }} [/INST]", "<s>[INST] {prompt} [/INST]"),
        ("{{ raise_exception('no') }}", None),
        ("{% for %}", None),
        ("{{ ''.__class__.__mro__ }}", None),
        ("a fixed text", None),
    ],
)  # fmt: skip
def test_the_prompt_of_a_chat_template(tmp_path: Path, template: str, expected: str | None) -> None:
    settings = {"chat_template": template, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert prompt_template(tmp_path) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.index }}{{ messages[0].content }}", "it prints an object (builtin_function_or_method)."),
        (
            "{{ range(99999) | random }}{{ range(99999) | random }}{{ messages[0].content }}",
            "it says something else each time.",
        ),
        ("{{ raise_exception('# A heading') }}", "it fails for one user message (ValueError)."),
        ("always the same", "it does not show the user's message."),
    ],
)
def test_a_card_says_why_it_shows_no_chat_template(
    tiny_llama: Path, tmp_path: Path, invoke: Command, template: str, reason: str
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    (source / "chat_template.jinja").write_text(template)
    card = invoke("card", write_recipe(tmp_path / "r.yaml", source), "--print", "gptq", "--dist", tmp_path).stdout
    assert f"The tokenizer's chat template is not shown here: {reason}" in card
    assert "A heading" not in card


@pytest.mark.parametrize("template", ["USER: {prompt} BOT:", "{prompt}", "''' {x} \\ \" {prompt}\n\n", None, "none"])
def test_the_prompt_as_python_fills_any_text(template: str | None) -> None:
    prompt = 'it\'s {a} "test" \\n'
    expected = template.replace("{prompt}", prompt) if template and "{prompt}" in template else prompt
    assert eval(prompt_as_python(template), {"prompt": prompt}) == expected


# -- snippets


@pytest.mark.loader
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("gptqmodel", "optimum")), reason="the extra `loaders` is not installed"
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_python_snippet_of_a_card_runs(
    method: str, tiny_llama: Path, invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{source: {tiny_llama}}}\ncalibration: {{dataset: pydoc, samples: 2, sequence_length: 64}}\n"
        f"{method}: {{variants: [{{group_size: 32}}]}}\n"
    )
    assert invoke("build", recipe, "--dist", tmp_path / "dist", "--device", "cpu").returncode == 0
    built = tmp_path / "dist" / f"tiny-llama-{method.upper()}" / "main"
    # the repo's name as a folder: the loaders then take it for a path
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / built.parent.name).symlink_to(built)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    run_snippets(built / "README.md")
