"""GGUF: levels byte for byte against llama-quantize of the same tree, our importance matrix against llama-imatrix.

Both tools are compiled from the pinned source distribution into the cache, once (about ten minutes on two cores).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

import quantize
from benchmarks.document import machine, replace_section, table
from quantize.files.cache import cache_folder
from quantize.gguf.imatrix import read_importance
from quantize.gguf.toolchain import VERSION, download_sdist
from quantize.recipe.levels import LEVELS

TOOLS = ("llama-quantize", "llama-imatrix")
SAMPLES, LENGTH = 16, 128


def tools() -> Path:
    """The folder of the compiled tools. Raises CalledProcessError."""
    folder = cache_folder() / "llama.cpp" / f"{VERSION}-tools"
    done = folder / "build" / "bin"
    if not all((done / name).is_file() for name in TOOLS):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(download_sdist(folder)) as tar:
            members = []
            for member in tar:
                _, found, inside = member.name.partition("/vendor/llama.cpp/")
                if found:
                    member.name = inside
                    members.append(member)
            tar.extractall(folder, members, filter="data")
        configure = ["cmake", "-B", "build", "-DGGML_NATIVE=OFF", "-DLLAMA_CURL=OFF", "-DCMAKE_BUILD_TYPE=Release"]
        configure += ["-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
        subprocess.run(configure, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["cmake", "--build", "build", "-j", str(os.cpu_count()), "--target", *TOOLS],
            cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return done


def compare(folder: Path) -> None:
    """Build every level of a small model both ways and write the section."""
    from tests.tiny import wide_model

    bin_folder = tools()
    demo = folder / "demo.yaml"
    demo.write_text("extends: demo\n", encoding="utf-8")
    tokenizer = quantize.plan(quantize.load_recipe(demo)).source.folder
    model = wide_model(folder / "small", tokenizer)
    text = folder / "text.txt"
    text.write_text(_text(), encoding="utf-8")
    recipe = {
        "model": {"source": str(model), "name": "Small"},
        "calibration": {
            "dataset": {"file": str(text)}, "samples": SAMPLES, "sequence_length": LENGTH, "compute_dtype": "float32",
        },
        "gguf": {"levels": list(LEVELS)},
    }  # fmt: skip
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    start = time.perf_counter()
    options = ["--dist", str(folder / "dist"), "--no-measure", "--json"]
    command = [sys.executable, "-m", "quantize", "build", str(path), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    plan = quantize.plan(quantize.load_recipe(path), quantize.PlanOptions(dist=folder / "dist"))
    assert plan.gguf
    ours = plan.gguf.folder
    rows = []
    for item in plan.gguf.levels:
        target = folder / "theirs.gguf"
        command = [str(bin_folder / "llama-quantize")]
        if item.wants_imatrix:
            command += ["--imatrix", str(plan.gguf.imatrix_file)]
        if LEVELS[item.level].wide:
            command += ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
        command += [str(plan.gguf.conversion.path), str(target), str(LEVELS[item.level].ftype)]
        # in the folder of the importance matrix, whose name as it was given goes into the file
        subprocess.run(command, check=True, cwd=ours, capture_output=True)
        real = (ours / item.file).read_bytes()
        same = "yes" if real == target.read_bytes() else "NO"
        rows.append([item.level, f"{len(real):,}", "yes" if len(real) == item.nbytes else "NO", same])
    replace_section(
        "gguf",
        f"""## GGUF levels against llama-quantize

A random Llama of 256-wide rows, every level with our importance matrix; llama-quantize and llama-imatrix compiled from
the source distribution of llama-cpp-python {VERSION}; {machine()}. All {len(rows)} levels, conversion and calibration
took {seconds:.0f} s.

{table(["level", "bytes", "as planned", "equal in every byte"], rows)}

Importance matrix of {SAMPLES} windows against llama-imatrix on the same tokens, channel by channel, both in 32 bits:
{_imatrix(bin_folder, plan, folder)}
""",
    )


def _imatrix(bin_folder: Path, plan: quantize.planning.Plan, folder: Path) -> str:  # type: ignore[name-defined]
    """The largest relative difference of a channel's sum, from one text both tools cut alike."""
    from quantize.calibration.tokens import load_tokenizer, sample_tokens

    assert plan.gguf
    tokenizer = load_tokenizer(plan.source)
    ids = sample_tokens(plan.recipe.calibration, tokenizer).ids
    # llama-imatrix cuts a text into windows itself: it gets the text of exactly our tokens, and we check its own
    text = tokenizer.decode(ids.reshape(-1), clean_up_tokenization_spaces=False)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != ids.reshape(-1).tolist():
        return "not compared, the windows' text does not tokenize back to the same tokens."
    file, out = folder / "windows.txt", folder / "theirs-imatrix.gguf"
    file.write_text(text, encoding="utf-8")
    # at full width and without flash attention: llama.cpp else rounds activations to 16 bits before it squares them
    wide = next(item.file for item in plan.gguf.levels if item.level == "F32")
    command = [
        str(bin_folder / "llama-imatrix"), "-m", str(plan.gguf.folder / wide), "-f", str(file), "-o", str(out),
        "-c", str(LENGTH), "--no-ppl", "-ctk", "f32", "-ctv", "f32", "-fa", "off",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = read_importance(plan.gguf.folder / str(plan.gguf.imatrix_file)), read_importance(out)
    assert ours.sums.keys() <= theirs.sums.keys()
    apart = [np.abs(ours.sums[name] / theirs.sums[name] - 1).reshape(-1) for name in ours.sums]
    everything = np.concatenate(apart)
    return f"median {np.median(everything):.1e}, largest {everything.max():.1e} relative."


def _text() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))
