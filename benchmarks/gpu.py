"""On a GPU: a random model of 7B shape in eight GPTQ branches, the solver's two ways, and gptqmodel where it is.

Skipped, with a word, where torch sees no GPU. The model's 13 GB are written to the scratch folder (TMPDIR).
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.document import machine, replace_section, table
from benchmarks.ours import DAMP, Built, Task, Variant, stages_table
from benchmarks.random_model import SHAPE, text, write_model

SAMPLES, LENGTH = 128, 2048


def compare(variants: list[Variant], folder: Path, shape: dict[str, Any] = SHAPE, device: str = "cuda") -> None:
    """Build all ``variants`` twice, look whether the bytes are the same, and write the section ``gpu``."""
    import torch

    from quantize.dist.manifest import MANIFEST_NAME

    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: skipped, torch sees no CUDA device here", flush=True)
        return
    model = write_model(folder / "model", shape, LENGTH, device)
    corpus = folder / "text.txt"
    corpus.write_text("\n".join([text()] * 4), encoding="utf-8")
    task = Task({"source": str(model), "name": "Random"}, str(corpus), SAMPLES, LENGTH)
    builds = [
        task.build(folder / name, cells, device=device, propagate="source")
        for name, cells in (("first", variants), ("again", variants), ("one", variants[:1]))
    ]
    rows = [
        (f"{len(cells)} branches" if len(cells) > 1 else "1 branch", built)
        for cells, built in zip((variants, variants, variants[:1]), builds, strict=True)
    ]
    manifests = [json.loads(path.read_text()) for path in sorted(builds[0].dist.rglob(MANIFEST_NAME))]
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    replace_section(
        "gpu",
        f"""## On a GPU

Llama of 7B shape ({shape["num_hidden_layers"]} blocks, width {shape["hidden_size"]}), random bfloat16 weights,
{SAMPLES} x {LENGTH} tokens, `propagate: source`; {name}, {machine()}; computed as
{manifests[0]["compute"] if manifests else "?"}. Built again, the branches are {_same(builds[0], builds[1])}.

{stages_table(rows, "run")}

{_peer(task, variants[0], folder) if device == "cuda" else ""}

One weight of {shape["hidden_size"]} x {shape["hidden_size"]}, all branches, the factorization included:

{_kernels(variants, shape["hidden_size"], device)}
""",
    )


def _same(first: Built, second: Built) -> str:
    files = [path.relative_to(first.dist) for path in sorted(first.dist.rglob("*.safetensors"))]
    odd = [path for path in files if (first.dist / path).read_bytes() != (second.dist / path).read_bytes()]
    return f"other bytes in {len(odd)} of {len(files)} files" if odd else "the same in every byte of their weights"


def _kernels(variants: list[Variant], width: int, device: str) -> str:
    """Seconds of the solve in the compiled kernel and in torch, and rows whose codes differ."""
    import torch

    from quantize.calibration.forward import choose_device
    from quantize.methods.columns import kernel_of
    from quantize.methods.gptq import GptqParameters, solve

    where = choose_device(device)
    random = torch.Generator(device).manual_seed(0)
    weight = torch.randn(width, width, generator=random, device=device) * 0.02
    inputs = torch.randn(4 * width, width, generator=random, device=device)
    hessian = inputs.t() @ inputs
    asked = [GptqParameters(v.bits, v.group_size, v.desc_act, damp_percent=DAMP) for v in variants]
    found, rows = [], []
    for kernel in (kernel_of(where), "torch"):
        for timed in (False, True):  # the first run compiles
            start = time.perf_counter()
            solutions = solve(weight, hessian, asked, kernel=kernel)
            if device == "cuda":
                torch.cuda.synchronize()
            if timed:
                rows.append([kernel, f"{time.perf_counter() - start:.2f}"])
        found.append(solutions)
    differing = sum(int((one.codes != two.codes).any(dim=1).sum()) for one, two in zip(found[0], found[1], strict=True))
    rows[0].append(f"{differing} of {width * len(variants)}")
    rows[1].append("")
    return table(["solver in", "seconds", "rows of other codes than torch's"], rows)


def _peer(task: Task, variant: Variant, folder: Path) -> str:
    if importlib.util.find_spec("gptqmodel") is None:
        return "gptqmodel is not installed here."
    done, _ = task.build_by("gptqmodel", folder / "peer", [variant], device="cuda")
    return f"gptqmodel takes {done.seconds:.0f} s for one branch, {variant.name}, on the same tokens (float16)."
