"""Children: no code of a model's repo without consent, no tokens, limits, an end."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from hub_server import TOKEN, HubServer, Repo

from quantize.files.child import Child, ChildFailed, Task, run_child, without_secrets

EVIL = """\
import os
with open({marker!r}, "a") as file:
    file.write("ran, token: " + str("HF_TOKEN" in os.environ) + "\\n")
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
RECIPE = """\
model: {{source: {source}, trust_remote_code: {trust}}}
release: {{owner: me}}
calibration: {{dataset: pydoc, samples: 2, sequence_length: 64}}
gguf: {{levels: [Q8_0], imatrix: false}}
"""
CALLERS = ("LLaDAModelLM", "ChatGLMModel", "DeepseekForCausalLM", "MiniMaxM2ForCausalLM", "Glm4ForCausalLM")
"""Architectures whose converter asks transformers to run the repo's code."""


def evil_model(folder: Path, tiny_llama: Path, marker: Path, architecture: str = CALLERS[0]) -> Path:
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return folder


@pytest.mark.parametrize("architecture", CALLERS)
def test_a_converter_runs_no_code_of_the_repo(
    architecture: str, tiny_llama: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker", architecture)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=source, trust="false"))
    planned = invoke("plan", recipe, "--dist", tmp_path / "dist")
    assert planned.returncode == 0, planned.stderr
    assert "cannot convert" in planned.stdout
    built = invoke("build", recipe, "--dist", tmp_path / "dist", "--device", "cpu")
    assert built.returncode != 0
    if architecture == CALLERS[0]:
        assert "`model.trust_remote_code: true`" in built.stderr
    assert not (tmp_path / "marker").exists()


def test_nor_of_a_repo_on_the_hub(tiny_llama: Path, tmp_path: Path, hub: HubServer, run_quantize: Command) -> None:
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker")
    hub.repos["alice/evil"] = Repo()
    hub.repos["alice/evil"].commit("main", {path.name: path.read_bytes() for path in source.iterdir()})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source="alice/evil", trust="false"))
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    planned = run_quantize("plan", recipe, "--dist", tmp_path / "dist", env=environment)
    assert planned.returncode == 0, planned.stderr
    assert "`model.trust_remote_code: true`" in planned.stdout
    assert not (tmp_path / "marker").exists()


def test_with_consent_it_runs_in_a_child_without_tokens(
    tiny_llama: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=source, trust="true"))
    assert invoke("plan", recipe, "--dist", tmp_path / "dist").returncode == 0
    assert set((tmp_path / "marker").read_text().splitlines()) == {"ran, token: False"}


def worker(folder: Path, body: str) -> Path:
    file = folder / "worker.py"
    lines = "\n".join("    " + line for line in body.splitlines())
    file.write_text(f"import os, sys, time\ndef run(arguments):\n{lines}\n")
    return file


def test_a_child_sees_no_secrets_and_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "MY_NOTES",
        "PYTHONPATH",
    ):
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    body = (
        "from huggingface_hub import get_token\nreturn [dict(os.environ), get_token(), os.listdir(os.environ['HOME'])]"
    )
    seen, token, home = run_child(Task(worker(tmp_path, body), None))
    assert "private" not in seen.values()
    assert seen["OMP_NUM_THREADS"] == "1"
    assert token is None
    assert home == []


def test_what_a_library_prints_is_no_answer(tmp_path: Path) -> None:
    body = "print('{\"value\": 7}')\nos.write(1, b'noise\\n')\nreturn arguments + 1"
    told: list[str] = []
    assert run_child(Task(worker(tmp_path, body), 41), told.append) == 42
    assert "noise\n" in told


@pytest.mark.parametrize(
    ("body", "reason", "kind"),
    [
        ("raise ValueError('no\\nway')", "no way", "ValueError"),
        ("sys.exit('not today')", "not today", "SystemExit"),
        ("os.abort()", "was killed by SIGABRT", ""),
        ("print('why')\nsys.stdout.flush()\nos._exit(3)", "ended without an answer (exit code 3): why", ""),
        ("x = bytearray(3 * 2**30)", "not enough memory", "MemoryError"),
    ],
)
def test_its_failures_are_one_reason(tmp_path: Path, body: str, reason: str, kind: str) -> None:
    with pytest.raises(ChildFailed) as caught:
        run_child(Task(worker(tmp_path, body), None, limits={"RLIMIT_AS": 2 * 2**30}))
    assert (caught.value.reason, caught.value.kind) == (reason, kind)


def test_the_end_of_a_child_is_the_end_of_what_it_started(tmp_path: Path) -> None:
    body = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    told: list[str] = []
    with Child(Task(worker(tmp_path, body), None, seconds=3.0)) as child, pytest.raises(ChildFailed, match="3 seconds"):
        child.wait(told.append)
    pid = int(told[0])
    for _ in range(100):
        if not _is_running(pid):
            break
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_secrets_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    before: Any = constants.HF_TOKEN_PATH
    with without_secrets():
        assert "HF_TOKEN" not in os.environ
        assert huggingface_hub.get_token() is None
    assert os.environ["HF_TOKEN"] == "hf_dummy"
    assert before == constants.HF_TOKEN_PATH
