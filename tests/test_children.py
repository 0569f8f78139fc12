"""Children: no code of a model's repo without consent, no tokens, limits, an end."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import Command
from hub_server import TOKEN, HubServer, Repo

from quantize.files.child import LONGEST_LINE, Child, ChildFailed, Task, run_child, without_secrets


def llama_cpp(test: Any) -> Any:
    """Mark of tests that run llama.cpp's converter."""
    for mark in needs.LLAMA_CPP:
        test = mark(test)
    return test


EVIL = """\
import os
with open({marker!r}, "a") as file:
    import huggingface_hub
    file.write(f"ran, token: {{'HF_TOKEN' in os.environ}} {{huggingface_hub.get_token()}}\\n")
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
CALLERS = ("LLaDAModelLM", "DreamModel", "LlamaForCausalLM")
"""Architectures whose converters ask transformers to run the repo's code, and one whose converter leaves it open."""
CONSENT = "does not run unless the recipe says `model.trust_remote_code: true`"


def evil_model(folder: Path, tiny_llama: Path, marker: Path, architecture: str = CALLERS[0], **changes: Any) -> Path:
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture], **changes}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return folder


@llama_cpp
@pytest.mark.parametrize("architecture", CALLERS)
def test_a_plan_runs_no_code_of_the_repo(
    architecture: str, tiny_llama: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker", architecture)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=source, trust="false"))
    planned = invoke("plan", recipe, "--dist", tmp_path / "dist")
    assert planned.returncode == 0, planned.stderr
    assert "llama.cpp cannot convert this model: " in planned.stdout
    assert CONSENT in planned.stdout
    assert not (tmp_path / "marker").exists()


@llama_cpp
def test_nor_do_a_build_and_a_rebuild(
    tiny_llama: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker", max_position_embeddings=2048)
    monkeypatch.chdir(source)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=tmp_path / "evil", trust="false"))
    built = invoke("build", recipe, "--dist", tmp_path / "dist", "--device", "cpu")
    assert built.returncode != 0
    assert CONSENT in built.stderr
    assert built.stderr.count("error:") == 1
    inputs = {
        "conversion": {"outtype": "F16", "name": "Evil", "authorship": {"general.quantized_by": "me"}},
        "tensor_types": {}, "max_file_size": 5 * 10**10, "imatrix": None,
    }  # fmt: skip
    manifest = {
        "schema": 1, "repo": "me/evil-GGUF", "branch": "main", "levels": {"Q8_0": {"key_inputs": inputs, "files": {}}},
        "source": {"name": "evil", "commit": None, "files": {}}, "model": {"trust_remote_code": True},
    }  # fmt: skip
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "quantize-manifest.json").write_text(json.dumps(manifest))
    again = invoke("rebuild", tmp_path / "theirs", "--source", tmp_path / "evil", "--device", "cpu")
    assert again.returncode != 0
    assert CONSENT in again.stderr, again.stderr
    assert not (tmp_path / "marker").exists()


@llama_cpp
def test_nor_does_a_plan_of_a_repo_on_the_hub(
    tiny_llama: Path, tmp_path: Path, hub: HubServer, run_quantize: Command
) -> None:
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker")
    hub.repos["alice/evil"] = Repo()
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    head = hub.repos["alice/evil"].commit("main", files)

    def told(handler: Any) -> bool:
        siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40} for name, data in files.items()]
        handler.answer({"id": "alice/evil", "modelId": "alice/evil", "sha": head, "siblings": siblings})
        return True

    hub.faults.extend([("GET /api/models/alice/evil/revision", told)] * 9)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source="alice/evil", trust="false"))
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    planned = run_quantize("plan", recipe, "--dist", tmp_path / "dist", env=environment)
    assert planned.returncode == 0, planned.stderr
    assert CONSENT in planned.stdout
    assert not (tmp_path / "marker").exists()


@llama_cpp
def test_with_consent_it_runs_in_a_child_without_tokens(
    tiny_llama: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / ".cache" / "huggingface"
    home.mkdir(parents=True)
    (home / "token").write_text("hf_dummy")
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = evil_model(tmp_path / "evil", tiny_llama, tmp_path / "marker")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=source, trust="true"))
    assert invoke("plan", recipe, "--dist", tmp_path / "dist").returncode == 0
    assert set((tmp_path / "marker").read_text().splitlines()) == {"ran, token: False None"}


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


@pytest.mark.parametrize(
    "name",
    ["DATABASE_URL", "PIP_INDEX_URL", "MY_API_KEY", "CUDA_REGISTRY_TOKEN", "VLLM_API_KEY", "AWS_PROFILE", "LC_SECRET"],
)
def test_nor_what_is_called_like_a_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "https://user:private@example.org")
    assert name not in run_child(Task(worker(tmp_path, "return dict(os.environ)"), None))


INSIDE = """\
import importlib.util, pathlib, pickle, runpy, ctypes, types, shutil, tempfile
folder = pathlib.Path(arguments)
"""
WAYS = {
    "from the folder": "sys.path.insert(0, arguments)\nimport evil",
    "from where it works": "os.chdir(arguments)\nsys.path.insert(0, '')\nimport evil",
    "by its file": "spec = importlib.util.spec_from_file_location('a', folder / 'evil.py')\n"
                   "spec.loader.exec_module(importlib.util.module_from_spec(spec))",
    "as a script": "runpy.run_path(str(folder / 'evil.py'))",
    "compiled": "exec(compile((folder / 'evil.py').read_text(), str(folder / 'evil.py'), 'exec'))",
    "as a copy": "copy = tempfile.mkdtemp()\nshutil.copy(folder / 'evil.py', copy)\n"
                 "sys.path.insert(0, copy)\nimport evil",
    "as a pickle": "pickle.loads((folder / 'evil.pkl').read_bytes())",
    "past a handler": "try:\n    runpy.run_path(str(folder / 'evil.py'))\n"
                      "except Exception:\n    sys.exit('another reason')",
    "by transformers": "from transformers.dynamic_module_utils import get_class_from_dynamic_module as get\n"
                       "get('evil.EvilTokenizer', arguments)",
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_model_has_no_way_in(way: str, trusted: bool, tmp_path: Path) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass EvilTokenizer:\n    pass\n")
    (model / "evil.pkl").write_bytes(pickle.dumps(Opens(str(marker))))
    task = Task(worker(tmp_path, INSIDE + WAYS[way]), str(model), closed=[model], allow_remote_code=trusted)
    if trusted:
        run_child(task)
    else:
        with pytest.raises(ChildFailed) as caught:
            run_child(task)
        assert caught.value.wants_remote_code
    assert marker.exists() == trusted


class Opens:
    """Its pickle opens a file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return open, (self.name, "w")


@pytest.mark.parametrize("closed", [True, False])
def test_native_code_comes_from_anywhere_but_the_model(closed: bool, tmp_path: Path) -> None:
    """Tools compile kernels into caches of their own."""
    shutil.copy(str(find_spec("markupsafe._speedups").origin), tmp_path / "_speedups.so")  # type: ignore[union-attr]
    body = (
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('markupsafe._speedups', arguments + '/_speedups.so')\n"
        "return importlib.util.module_from_spec(spec).__name__"
    )
    task = Task(worker(tmp_path, body), str(tmp_path), closed=[tmp_path] if closed else [])
    if closed:
        task = replace(task, worker=worker(tmp_path.parent, body))
        with pytest.raises(ChildFailed) as caught:
            run_child(task)
        assert caught.value.refused == ("_speedups.so",)
    else:
        assert run_child(task) == "markupsafe._speedups"


def test_a_model_may_lie_among_packages_and_packages_among_a_model(tmp_path: Path) -> None:
    body = "sys.path.insert(0, arguments)\nimport numpy, jinja2\nreturn numpy.__name__"
    around = Path(sys.prefix)
    assert run_child(Task(worker(tmp_path, body), str(tmp_path), closed=[around])) == "numpy"
    inner = Path(find_spec("jinja2").origin).parent  # type: ignore[union-attr, arg-type]
    with pytest.raises(ChildFailed) as caught:
        run_child(Task(worker(tmp_path, body), str(tmp_path), closed=[inner]))
    assert caught.value.refused == ("__init__.py",)


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


def test_a_child_that_leaves_others_behind_has_ended(tmp_path: Path) -> None:
    body = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "return child.pid"
    )
    assert not _is_running(run_child(Task(worker(tmp_path, body), None)))


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    inside = worker(tmp_path, "import subprocess\nprint(os.getpid(), flush=True)\nos.system('sleep 600')")
    code = (
        "from pathlib import Path\nfrom quantize.files.child import Task, run_child\n"
        f"run_child(Task(Path({str(inside)!r}), None), lambda line: print(line, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not _is_running(pid):
            break
        time.sleep(0.05)
    assert not _is_running(pid)


def test_long_lines_and_much_output_are_borne(tmp_path: Path) -> None:
    body = "for _ in range(30):\n    os.write(1, b'x' * 10**6)\nprint()\nprint('1%\\r2%\\r3%')\nraise ValueError('end')"
    told: list[int] = []
    with pytest.raises(ChildFailed, match="end") as caught:
        run_child(Task(worker(tmp_path, body), None), lambda line: told.append(len(line)))
    assert max(told) <= LONGEST_LINE + 1
    assert "1%\n2%\n3%\n" in caught.value.log


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
