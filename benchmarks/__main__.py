"""``python -m benchmarks``: the set of eight on SmolLM2, ours against as many runs of gptqmodel.

Everything runs in this one call, on the same token ids, with threads pinned to the cores; times are of whole
processes, start-up included. Prints the tables as Markdown, and with ``--out`` writes them to a file.
"""

from __future__ import annotations

import json
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import click

from benchmarks.child import THREADS, Run, run

EIGHT = [(4, 64, False), (4, 32, True), (4, 16, True), (4, 64, True),
         (8, 32, True), (8, 64, True), (8, 64, False), (8, -1, True)]  # fmt: skip
DAMP = 0.1
WINDOWS = 8  # of the held-out text


@click.command()
@click.option("--calibration", required=True, type=click.Path(exists=True, dir_okay=False), help="Calibration text.")
@click.option("--evaluation", required=True, type=click.Path(exists=True, dir_okay=False), help="Held-out text.")
@click.option("--samples", default=32, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--peers", default=8, show_default=True, help="How many of the eight to run with gptqmodel.")
@click.option("--rounds", default=1, show_default=True, help="Builds of ours to take the median of.")
@click.option("--out", type=click.Path(dir_okay=False), help="Markdown file to write.")
def main(
    calibration: str, evaluation: str, samples: int, length: int, peers: int, rounds: int, out: str | None
) -> None:
    """Measure and print the tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        eight = _recipe(folder / "eight.yaml", calibration, samples, length, EIGHT)
        one = _recipe(folder / "one.yaml", calibration, samples, length, EIGHT[:1])
        source, ids = _prepare(eight, folder / "ids.npy")
        ours = _median([_build(eight, folder / f"eight{index}") for index in range(rounds)])
        single = _median([_build(one, folder / f"one{index}") for index in range(rounds)])
        own = _recipe(folder / "own.yaml", calibration, samples, length, EIGHT[:peers], propagate="quantized")
        quantized = [_build(own, folder / "own")] if peers else []
        for name, done in (("eight", [ours]), ("one", [single]), ("quantized", quantized)):
            click.echo(f"ours, {name}: " + ", ".join(f"{item[0].seconds:.0f} s" for item in done), err=True)
        theirs = []
        for index, (bits, group_size, desc_act) in enumerate(EIGHT[:peers]):
            target = folder / "peer" / _branch(index)
            arguments = [source, str(target), str(ids), str(bits), str(group_size), str(desc_act), str(DAMP)]
            theirs.append(run("-m", "benchmarks.peer_gptqmodel", *arguments))
            click.echo(f"gptqmodel {_branch(index)}: {theirs[-1].seconds:.0f} s", err=True)
        peer_folder = folder / "peer" if peers else None
        quality = _measure(eight, folder / "eight0", peer_folder, folder / "own", evaluation, length)
    text = _report(
        ours, single, quantized, theirs, quality, samples, length, Path(calibration).name, Path(evaluation).name
    )
    click.echo(text)
    if out:
        Path(out).write_text(text, encoding="utf-8")


def _branch(index: int) -> str:
    bits, group_size, desc_act = EIGHT[index]
    return "main" if index == 0 else f"gptq-{bits}bit-{group_size}g-actorder_{desc_act}"


def _recipe(
    path: Path, text: str, samples: int, length: int, variants: list[tuple[int, int, bool]], propagate: str = "source"
) -> Path:
    recipe = {
        "extends": "demo",
        "calibration": {"dataset": str(Path(text).resolve()), "samples": samples, "sequence_length": length},
        "gptq": {
            "damp_percent": DAMP,
            "propagate": propagate,
            "variants": [
                {"bits": bits, "group_size": size, "desc_act": order, "branch": _branch(index)}
                for index, (bits, size, order) in enumerate(variants)
            ],
        },
    }
    recipe["calibration"]["dataset"] = {"file": recipe["calibration"]["dataset"]}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def _prepare(recipe: Path, target: Path) -> tuple[str, Path]:
    """The converted source's folder, and the very token ids of our build as a file for the peer."""
    import numpy as np

    import quantize
    from quantize.calibration.tokens import load_tokenizer, sample_tokens

    loaded = quantize.load_recipe(recipe)
    source = quantize.plan(loaded, dist=target.parent / "none").source
    np.save(target, sample_tokens(loaded.recipe.calibration, load_tokenizer(source)).ids)
    return str(source.folder), target


def _build(recipe: Path, dist: Path) -> tuple[Run, dict[str, float]]:
    done = run("-m", "quantize", "build", str(recipe), "--dist", str(dist), "--device", "cpu", "--json")
    return done, json.loads(done.output)["seconds"]


def _median(runs: list[tuple[Run, dict[str, float]]]) -> tuple[Run, dict[str, float]]:
    return sorted(runs, key=lambda item: item[0].seconds)[len(runs) // 2]


def _measure(
    recipe: Path, dist: Path, peer: Path | None, own: Path, text: str, length: int
) -> dict[str, dict[str, float]]:
    """Perplexity and KL divergence of our branches and the peer's, all in one streamed run."""
    import torch

    import quantize
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.formats.gptq_reader import GptqReader
    from quantize.measure.quality import measure_quality
    from quantize.recipe.schema import Calibration, Corpus
    from quantize.source.streamed import StreamedModel

    plan = quantize.plan(quantize.load_recipe(recipe), dist=dist)
    corpus = Calibration(dataset=[Corpus(file=text)], samples=WINDOWS, sequence_length=length)
    ids = sample_tokens(corpus, load_tokenizer(plan.source)).ids
    model = StreamedModel(plan.source, plan.table.prefix, torch.float32, torch.device("cpu"), head=True)
    readers = {item.branch: GptqReader(item.folder) for item in plan.variants}
    if peer is not None:
        readers |= {f"quantized {folder.name}": GptqReader(folder) for folder in sorted(own.glob("[!.]*/*"))}
        readers |= {f"gptqmodel {folder.name}": GptqReader(folder) for folder in sorted(peer.iterdir())}
    return {row.branch: row.as_data() for row in measure_quality(model, ids, readers, 8, progress=False)}


def _report(
    ours: tuple[Run, dict[str, float]],
    single: tuple[Run, dict[str, float]],
    quantized: list[tuple[Run, dict[str, float]]],
    theirs: list[Run],
    quality: dict[str, dict[str, float]],
    samples: int,
    length: int,
    calibration: str,
    evaluation: str,
) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "gptqmodel"))
    lines = [
        "# Benchmarks",
        "",
        f"SmolLM2-135M-Instruct, {samples} x {length} tokens of {calibration}, measured on {evaluation}; "
        f"{THREADS} threads, {platform.machine()}, {versions}. Whole processes, start-up included; "
        "one call of `python -m benchmarks --calibration FILE --evaluation FILE`.",
        "",
        "## Time and memory",
        "",
        "| run | branches | seconds | seconds a branch | ratio to ours | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    unit = ours[0].seconds / len(EIGHT)

    def row(name: str, count: int, seconds: float, peak: int) -> None:
        each = seconds / count
        lines.append(f"| {name} | {count} | {seconds:.0f} | {each:.1f} | {each / unit:.1f} | {peak / 1e9:.2f} GB |")

    row("ours, `propagate: source`", len(EIGHT), ours[0].seconds, ours[0].peak_bytes)
    row("ours, `propagate: source`", 1, single[0].seconds, single[0].peak_bytes)
    for done, _ in quantized:
        row("ours, `propagate: quantized`", len(theirs), done.seconds, done.peak_bytes)
    if theirs:
        row("gptqmodel", len(theirs), sum(r.seconds for r in theirs), max(r.peak_bytes for r in theirs))
    lines += ["", "Stages of ours, seconds:", "", "| branches | " + " | ".join(ours[1]) + " |"]
    lines.append("|---" * (len(ours[1]) + 1) + "|")
    for count, stages in ((8, ours[1]), (1, single[1])):
        lines.append(f"| {count} | " + " | ".join(f"{value:.1f}" for value in stages.values()) + " |")
    lines += ["", "## Quality", "", "Perplexity (KL divergence from the source):", ""]
    lines += ["| branch | ours, source | ours, quantized | gptqmodel |", "|---|---|---|---|"]

    def cell(name: str) -> str:
        data = quality.get(name)
        return f"{data['perplexity']:.2f} ({data['kl_divergence']:.4f})" if data else "-"

    for name in quality:
        if " " not in name:
            lines.append(f"| {name} | {cell(name)} | {cell(f'quantized {name}')} | {cell(f'gptqmodel {name}')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
