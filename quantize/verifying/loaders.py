"""Load the branch in real consumers, each in its own process, and check their output.

The consumer generates a few tokens greedily. They are then run once through the branch's dequantized weights: each must
be the most likely token there too, or so close to it that rounding decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError
from quantize.files.child import ChildFailed, Task, run_child
from quantize.formats import compressed
from quantize.source.checkpoint import read_header
from quantize.source.resolved import Source
from quantize.source.routing import expert_of
from quantize.verifying.checks import Check

PROMPT = "The ship had been at sea for three weeks when the cook"
TOKENS = 12
SLACK = 0.5
"""Largest distance, in nats, from the most likely token at which a generated one counts as equal: loaders compute in
16 bits, and llama.cpp rounds activations to 8."""
TIMEOUT = 1800.0


def check_gptq_or_awq(folder: Path) -> list[Check]:
    """Load a branch in transformers, with the packages that its format needs, and in vLLM if there is a GPU.

    transformers stacks the experts of a mixture before it replaces linears, so it finds none to replace: such branches
    are loaded by gptqmodel itself.
    """
    from quantize.verifying.forward import logits_of

    checks = []
    kind, renamed = _experts(folder)
    kernels: tuple[str, ...] = ("gptqmodel", "optimum")
    if _quant_method(folder) == compressed.METHOD:
        kernels = ("compressed_tensors",)
    for name, packages, consumer in (
        (_named("gptqmodel"), ("gptqmodel",), "gptqmodel")
        if kind
        else (_named("transformers", kernels[0]), ("transformers", *kernels), "transformers"),
        (_named("vllm"), ("vllm",), "vllm"),
    ):
        if renamed and consumer == "gptqmodel":
            checks.append(Check(name, "skipped", f"it uses other tensor names for experts of {kind}"))
            continue
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            checks.append(Check(name, "skipped", f"{', '.join(missing)} is not installed here"))
            continue
        if consumer == "vllm" and not _has_gpu():
            checks.append(Check(name, "skipped", "it needs a GPU"))
            continue
        checks.append(_check(name, consumer, folder, lambda ids: logits_of(folder, ids)))
    return checks


def _experts(folder: Path) -> tuple[str, bool]:
    """The model type of a mixture of experts (else empty), and whether gptqmodel expects other tensor names."""
    names = [name for file in sorted(folder.glob("*.safetensors")) for name in read_header(file)]
    if not any(expert_of(name) for name in names):
        return "", False
    kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    return kind, any(".block_sparse_moe.experts." in name for name in names)


def _quant_method(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check_gguf(folder: Path, files: Mapping[str, Sequence[str]], source: Source | None) -> list[Check]:
    """Load each GGUF file (by its first part if split) in llama.cpp, through llama-cpp-python.

    Args:
        files: all parts by the first. source: the model to run the dequantized tensors in; None skips the comparison.
    """
    from quantize.verifying.forward import level_logits

    name = _named("llama_cpp_python")
    if find_spec("llama_cpp") is None:
        return [Check(name, "skipped", "llama-cpp-python is not installed here (`make setup`)")]
    checks = []
    for first, parts in files.items():
        logits = level_logits(source, [folder / part for part in parts]) if source else None
        checks.append(_check(f"{name}: {first}", "llama", folder / first, logits))
    return checks


def _check(name: str, consumer: str, target: Path, logits: Any) -> Check:
    arguments = {"consumer": consumer, "target": str(target.resolve()), "prompt": PROMPT, "tokens": TOKENS}
    # the real home folder, where loaders cache the kernels that they compile
    task = Task(
        Path(__file__).with_name("worker_load.py"), arguments, seconds=TIMEOUT, home=Path.home(),
        closed=[target if target.is_dir() else target.parent],
        pickles=True,  # vLLM communicates with its own processes through pickles
    )  # fmt: skip
    try:
        answer = run_child(task)
    except ChildFailed as error:
        if error.wants_remote_code:
            return Check(
                name, "failed", f"cannot load it without code from its repo ({error.refused[-1]}), which is not run"
            )
        return Check(name, "failed", f"cannot load it: {error.reason}")
    ids, start, text = answer["ids"], answer["prompt"], " ".join(answer["text"].split())
    if logits is None:
        return Check(name, "ok", f"loads, and generates '{text}'")
    try:
        expected = logits(ids)
    except (QuantizeError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        return Check(name, "failed", f"loads, but its tensors cannot be run here: {error}")
    return _compared(name, expected, ids, start, text)


def _compared(name: str, logits: Any, ids: list[int], start: int, text: str) -> Check:
    written = list(range(start, len(ids)))
    chances = logits.log_softmax(-1)
    behind = [float(chances[place - 1].max() - chances[place - 1, ids[place]]) for place in written]
    same = sum(gap == 0.0 for gap in behind)
    if max(behind, default=0.0) > SLACK:
        place = next(number for number, gap in enumerate(behind) if gap > SLACK)
        return Check(
            name, "failed",
            f"loads, but token {place + 1} of its output ('{text}') is not what the weights give "
            f"({behind[place]:.2f} nats behind)",
        )  # fmt: skip
    return Check(name, "ok", f"loads, and generates what the weights give: '{text}' ({same} of {len(written)} tokens)")


def _named(*packages: str) -> str:
    parts = []
    for package in packages:
        try:
            parts.append(f"{package.replace('_', '-')} {version(package)}")
        except PackageNotFoundError:
            parts.append(package.replace("_", "-"))
    return " + ".join(parts)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
