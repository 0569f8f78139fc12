"""The archived tools still read us: branches loaded by auto-gptq in an environment of its own, logits compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Task, Variant

PINS = [
    "auto-gptq==0.7.1", "transformers==4.46.3", "datasets<4", "huggingface-hub<1", "peft<0.14", "numpy<2", "pyarrow<20",
    "torch<2.7", "accelerate<1.3", "setuptools<80",
]  # fmt: skip
READER = Path(__file__).parent / "reader_auto_gptq.py"
CELLS = [Variant(4, 64, False), Variant(4, 32, True), Variant(8, -1, True), Variant(3, 64, False), Variant(2, 32, True)]


def environment() -> Path:
    """The Python of an environment with the archived packages, kept in the cache. Raises CalledProcessError."""
    from quantize.files.cache import cache_folder

    folder = cache_folder() / "archived" / "auto-gptq"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.is_file():
        venv.create(folder, with_pip=True, clear=True)
        # without CUDA its own build would fail on the kernels, which a CPU does not use
        settings = {**os.environ, "BUILD_CUDA_EXT": "0", "DISABLE_QIGEN": "1"}
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *(pin for pin in PINS if not pin.startswith("auto-gptq"))], check=True, env=settings)
        subprocess.run([*pip, "rouge", "gekko", "sentencepiece", "protobuf"], check=True, env=settings)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", PINS[0]], check=True, env=settings)
        ready.touch()
    return python


def check(task: Task, folder: Path) -> None:
    """Load branches there and here, and compare logits."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import quantize
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.formats.reader import BranchReader

    try:
        python = environment()
    except subprocess.CalledProcessError as error:
        replace_section("archived", f"## The archived loader\n\nNot checked: {error.cmd[-1]} could not be installed.")
        return
    from tests.tiny import write_model

    # with tied embeddings this loader leaves the embedding at zero, so the check takes a model without
    model_folder = write_model(folder / "model", tie_word_embeddings=False)
    task = Task({"source": str(model_folder), "name": "Random"}, task.calibration, 8, 128)
    built = task.build(folder, CELLS, propagate="source")
    loaded = quantize.load_recipe(folder / "recipe.json")
    plan = quantize.plan(loaded, quantize.PlanOptions(dist=folder / "none"))
    ids = sample_tokens(loaded.recipe.calibration, load_tokenizer(plan.source)).ids[:2, :128]
    np.save(folder / "ids.npy", ids)
    rows, versions = [], {}
    for cell in CELLS:
        branch = built.folder / cell.name
        command = [python, READER, branch, folder / "ids.npy", folder / "logits.npy"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean)
        if done.returncode:
            rows.append([cell.name, "does not load: " + done.stderr.strip().splitlines()[-1][:150]])
            continue
        versions = json.loads(done.stdout.splitlines()[-1])
        theirs = torch.from_numpy(np.load(folder / "logits.npy"))
        model = AutoModelForCausalLM.from_pretrained(plan.source.folder, dtype=torch.float32)
        reader = BranchReader(branch)
        with torch.inference_mode():
            for linear in plan.table.linears:
                model.get_submodule(linear.name).weight.copy_(reader.weight(linear.name))
            ours = model(torch.from_numpy(ids)).logits
        rows.append([cell.name, f"{float((ours - theirs).abs().max()):.1e} of {float(ours.abs().max()):.2g}"])
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    replace_section(
        "archived",
        f"""## The archived loader

Our branches of a small random Llama as they are on disk, loaded by {named or PINS[0]} on a CPU in an environment of its
own (Python {sys.version_info.major}.{sys.version_info.minor}), against our dequantized weights in transformers;
{machine()}.

{table(["branch", "largest difference of a logit"], rows)}

Models with tied embeddings (SmolLM2 among them) load there without an error, but with an embedding of zeros.
""",
    )
