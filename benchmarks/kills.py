"""Builds that are killed again and again, on one thread, on two, and on either by turns: do they end in the same bytes?

``python -m benchmarks.kills RECIPE`` is a server: everything heavy is imported once, and each build is a forked child.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.document import machine, replace_section, table
from quantize.reporter import Reporter

MOST_KILLS = 4  # in a row, before a chain may end
WEIGHTS = {".safetensors", ".gguf"}


@dataclass
class Chain:
    """Builds into one dist, all killed but the last.

    Attributes:
        kills: how many died. same, same_weights: whether every file, or every file of weights, is the uninterrupted
            build's. error: what a build said that failed.
    """

    threads: str
    kills: int = 0
    same: bool = False
    same_weights: bool = False
    error: str | None = None


def campaign(model: Path, kills: int, folder: Path, seed: int = 0) -> None:
    """Kill about ``kills`` builds of a small model for each way to count threads, and write the section."""
    recipe = _recipe(model, folder / "recipe.json")
    dice = random.Random(seed)
    with contextlib.ExitStack() as stack:
        servers = {count: stack.enter_context(_server(recipe, count)) for count in (1, 2)}
        wholes: dict[int, dict[str, str]] = {}
        seconds = {}
        for count, server in servers.items():
            server(folder / "first", None)  # hashes and kernels are remembered from now on
            shutil.rmtree(folder / "first")
            done = server(folder / f"whole-{count}", None)
            if done["status"]:
                raise RuntimeError(f"an uninterrupted build failed: {done['said'][-500:]}")
            wholes[count], seconds[count] = _hashes(folder / f"whole-{count}"), done["seconds"]
            print(f"{count} threads: {done['seconds']:.1f} s uninterrupted", flush=True)
        chains = []
        for ways in ((1,), (2,), (1, 2)):
            killed = 0
            while killed < kills:
                chain = _chain(servers, ways, seconds, wholes, min(kills - killed, dice.randint(1, MOST_KILLS)), folder,
                               dice)  # fmt: skip
                killed += chain.kills
                chains.append(chain)
                print(chain, flush=True)
    _write(chains, _weights(wholes[1]) == _weights(wholes[2]), model)


def _chain(
    servers: dict[int, Any],
    ways: tuple[int, ...],
    seconds: dict[int, float],
    wholes: dict[int, dict[str, str]],
    kills: int,
    folder: Path,
    dice: random.Random,
) -> Chain:
    chain, dist = Chain(" or ".join(map(str, ways))), folder / "chain"
    while chain.kills < kills:
        count = dice.choice(ways)
        done = servers[count](dist, dice.uniform(0, seconds[count]))
        if done["status"] != -signal.SIGKILL:
            seconds[count] = min(seconds[count], done["seconds"])  # on a machine less busy than before
            break  # it was through before
        chain.kills += 1
    last = dice.choice(ways)
    done = servers[last](dist, None)
    chain.error = None if done["status"] == 0 else done["said"][-300:]
    found = _hashes(dist)
    chain.same_weights = _weights(found) == _weights(wholes[last])
    chain.same = found == wholes[last]
    shutil.rmtree(dist)
    return chain


def _write(chains: list[Chain], equal: bool, model: Path) -> None:
    rows = []
    for threads in dict.fromkeys(chain.threads for chain in chains):
        some = [chain for chain in chains if chain.threads == threads]
        rows.append([
            threads, str(sum(chain.kills for chain in some)), str(len(some)),
            *(f"{sum(getattr(chain, name) for chain in some)} of {len(some)}" for name in ("same_weights", "same")),
            str(sum(chain.error is not None for chain in some)),
        ])  # fmt: skip
    replace_section(
        "kills",
        f"""## Killed builds

{model.name}, an AWQ and two GPTQ branches, one with a stream of its own; builds killed by SIGKILL at random moments, up
to {MOST_KILLS} times in a row, then let end; {machine()}. Each end is compared with the
uninterrupted build on as many threads as the last build of the chain had, which its manifests name. Uninterrupted
builds on one and on two threads have {"the same" if equal else "OTHER"} weights.

{table(["threads", "kills", "chains", "weights as uninterrupted", "all files as uninterrupted", "errors"], rows)}
""",
    )


def _recipe(model: Path, path: Path) -> Path:
    path.write_text(json.dumps({
        "model": {"source": str(model), "name": "Killed", "license": "other", "creator": "benchmark"},
        "release": {"owner": "local"},
        "calibration": {"dataset": "pydoc", "samples": 5, "sequence_length": 61},
        "awq": {"variants": [{"branch": "main", "group_size": 64}]},
        "gptq": {"variants": [
            {"branch": "main", "bits": 4, "group_size": 64},
            {"branch": "drifting", "bits": 3, "group_size": 64, "desc_act": True, "propagate": "quantized"},
        ]},
    }), encoding="utf-8")  # fmt: skip
    return path


def _hashes(dist: Path) -> dict[str, str]:
    """Of every finished file, by its place."""
    files = (path for path in sorted(dist.rglob("*")) if path.is_file())
    return {
        path.relative_to(dist).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if ".quantize" not in path.relative_to(dist).parts
    }


def _weights(hashes: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in hashes.items() if Path(name).suffix in WEIGHTS}


@contextlib.contextmanager
def _server(recipe: Path, threads: int) -> Iterator[Any]:
    command = [sys.executable, "-m", "benchmarks.kills", str(recipe)]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent.parent)}
    settings.pop("NUMBA_NUM_THREADS", None)  # numba finds the machine's own number, as on a user's machine
    with subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout

        def build(dist: Path, after: float | None) -> dict[str, Any]:
            print(json.dumps({"dist": str(dist), "after": after}), file=process.stdin, flush=True)
            assert process.stdout
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield build
        process.stdin.close()


def _serve(recipe: str) -> None:
    # no tensor is computed before the fork, after which torch's threads would be gone
    import transformers.conversion_mapping
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantize.building.resumable_pass  # noqa: F401
    import quantize.publishing.card  # noqa: F401

    transformers.AutoTokenizer, transformers.AutoModelForCausalLM  # noqa: B018  looked up on first use
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_build_in_child(recipe, asked["dist"], asked["after"])), flush=True)


def _build_in_child(recipe: str, dist: str, after: float | None) -> dict[str, Any]:
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_build(recipe, dist, writer))
    os.close(writer)
    status = None
    while status is None:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        if status is None and after is not None and time.monotonic() - start > after:
            os.kill(child, signal.SIGKILL)
            after = None
        time.sleep(0.002)
    with os.fdopen(reader, encoding="utf-8") as file:
        said = file.read()
    return {"status": status, "seconds": time.monotonic() - start, "said": said}


class _Printing(Reporter):
    def say(self, line: str) -> None:
        print(line)


def _build(recipe: str, dist: str, writer: int) -> int:
    from quantize.building import build_recipe
    from quantize.options import BuildOptions
    from quantize.recipe import load_recipe

    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            build_recipe(load_recipe(recipe), BuildOptions(dist=Path(dist), device="cpu"), _Printing())
        except BaseException as error:
            print(repr(error))
            code = 1
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        file.write(said.getvalue()[-2000:])
    return code


if __name__ == "__main__":
    _serve(sys.argv[1])
