"""``python -m tests.mutate [NAME ...]``: break the package on purpose, one line at a time, and see that a test notices.

Each mutant of ``mutants.yaml`` is put into a copy of the package, on which its tests run, in a process forked after the
heavy imports. The exit code is 3 where a mutant survives, where its text is no longer found in the source (then write
it anew), or where its tests cannot run.

The list is made by hand: mutation tools change every operator (thousands of runs, each of which compiles kernels), and
cannot follow what is compiled from source by numba.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("mutants.yaml")
LONGEST = 900  # seconds of one mutant's tests; more is a loop without an end, which is noticed too
PASSED, FAILED = 0, 1  # exit codes of pytest


@dataclass(frozen=True)
class Mutant:
    """A change of one place of the package.

    Attributes:
        file: below the package. old: text that is there exactly once. new: what takes its place.
        tests: pytest's arguments, of which at least one must fail. compiled: the kernels have to be compiled anew.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str] = field(default_factory=list)
    compiled: bool = False

    @property
    def stale(self) -> bool:
        return (ROOT / "quantize" / self.file).read_text(encoding="utf-8").count(self.old) != 1


def read_mutants() -> list[Mutant]:
    """Those of the list, with the tests of their group where they name none of their own."""
    groups = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    found = []
    for group in groups:
        tests = [f"tests/{test}" for test in group["tests"]]
        for entry in group["mutants"]:
            own = [f"tests/{test}" for test in entry.pop("tests", [])]
            found.append(Mutant(file=group["file"], tests=own or tests, **entry))
    return found


def run_tests(package: Path, tests: list[str], log: Path) -> int:
    """pytest's exit code in a forked process that imports the package of that folder; -1 where it had to be ended."""
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException), log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.path.insert(0, str(package))
            sys.dont_write_bytecode = True  # two mutants of one second and one length would be taken for each other
            import pytest

            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
        os._exit(code)
    until = time.monotonic() + LONGEST
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def judge(mutant: Mutant | None, scratch: Path, tests: list[str]) -> tuple[str, str, float, str]:
    """Name, outcome, seconds, and the end of the log. No mutant: all tests on the package as it is."""
    start, own = time.monotonic(), scratch / f"of-{os.getpid()}"
    if not own.exists():
        shutil.copytree(ROOT / "quantize", own / "quantize", ignore=shutil.ignore_patterns("__pycache__"))
    log, kernels = own / "log.txt", own / "kernels"
    if mutant is None:
        os.environ["NUMBA_CACHE_DIR"] = str(kernels)
        code = run_tests(own, tests, log)
        outcome = "passed" if code == PASSED else "failed"
    else:
        source, target = ROOT / "quantize" / mutant.file, own / "quantize" / mutant.file
        target.write_text(source.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        if mutant.compiled:
            kernels = own / "kernels-of-mutant"
        os.environ["NUMBA_CACHE_DIR"] = str(kernels)
        code = run_tests(own, mutant.tests, log)
        shutil.copy2(source, target)
        shutil.rmtree(own / "kernels-of-mutant", ignore_errors=True)
        outcome = {PASSED: "survived", FAILED: "killed", -1: "killed"}.get(code, "broken")
    name = mutant.name if mutant else "no mutant"
    return name, outcome, time.monotonic() - start, log.read_text(encoding="utf-8", errors="replace")[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description="Do the tests notice a broken package?")
    parser.add_argument("names", nargs="*", help="mutants to try; all without any")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that try them")
    options = parser.parse_args()
    every = read_mutants()
    if unknown := set(options.names) - {mutant.name for mutant in every}:
        parser.error(f"no mutant is named {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in every if not options.names or mutant.name in options.names]
    stale = [mutant for mutant in chosen if mutant.stale]
    for mutant in stale:
        print(f"stale     {mutant.name}: its text is not once in quantize/{mutant.file}", flush=True)
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("hypothesis", "numba", "pytest", "torch", "transformers"):  # once, before the forks
        importlib.import_module(name)

    tests = sorted({test for mutant in chosen for test in mutant.tests})
    counts = {"stale": len(stale)}
    with tempfile.TemporaryDirectory() as folder:
        work = partial(judge, scratch=Path(folder), tests=tests)
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            name, outcome, seconds, log = pool.apply(work, [None])
            print(f"{outcome:9} {name}: {len(tests)} tests or files in {seconds:.0f} s", flush=True)
            if outcome != "passed":
                print(log)
                return 3
            for name, outcome, seconds, log in pool.imap_unordered(work, [one for one in chosen if not one.stale]):
                counts[outcome] = counts.get(outcome, 0) + 1
                print(f"{outcome:9} {name} ({seconds:.0f} s)", flush=True)
                if outcome == "broken":
                    print(log)
    print(f"{len(chosen)} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 0 if counts.get("killed", 0) == len(chosen) else 3


if __name__ == "__main__":
    sys.exit(main())
