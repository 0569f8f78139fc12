"""The list of mutants fits the source and the tests: `make mutants` runs it, which takes minutes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutate import ROOT, Mutant, read_mutants

MUTANTS = read_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_text_is_in_the_source_once_and_its_change_is_python(mutant: Mutant) -> None:
    assert not mutant.stale, f"quantize/{mutant.file} has changed: write this mutant anew in tests/mutants.yaml"
    source = (ROOT / "quantize" / mutant.file).read_text(encoding="utf-8")
    changed = ast.dump(ast.parse(source.replace(mutant.old, mutant.new)))
    assert changed != ast.dump(ast.parse(source))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (Path(ROOT) / file).read_text(encoding="utf-8")


def test_names_are_different() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
