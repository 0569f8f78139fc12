"""Find out what transformers makes of a checkpoint, without importing torch.

The model is built on the meta device and tried there (``source/examine.py``), in a child process unless torch is
loaded already. The answer depends only on the config, the tensor headers and the installed packages, and is kept in
the cache by their hash.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_folder
from quantize.files.child import ChildFailed, Task, run_child
from quantize.files.digest import key_of
from quantize.files.versions import versions_of
from quantize.reporter import SILENT, Reporter
from quantize.source.anatomy import Anatomy
from quantize.source.resolved import Source

SCHEMA = 11
FOLDER = "anatomy"
PACKAGE = Path(__file__).parents[1]


def anatomy_of(
    source: Source, *, trust_remote_code: bool = False, here: bool = False, reporter: Reporter = SILENT
) -> Anatomy:
    """Examine a source's architecture, or read what is known of it.

    Args:
        here: torch will be needed in this process anyway, so that no child is started.

    Raises:
        SourceError: transformers does not support it, or the checkpoint does not fit it.
    """
    checkpoint = source.checkpoint
    code = {name: value for name, value in source.hashes.items() if name.endswith(".py")} if trust_remote_code else {}
    key = key_of({
        "schema": SCHEMA, "config": json.dumps(checkpoint.config, sort_keys=True), "code": code,
        "trust_remote_code": trust_remote_code,
        "tensors": {name: [spec.dtype, list(spec.shape)] for name, spec in checkpoint.in_files.items()},
        "versions": versions_of(["torch", "transformers"]),
    })  # fmt: skip
    place = cache_folder() / FOLDER / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Anatomy.of(json.loads(place.read_text(encoding="utf-8")))
    with _folder(source) as folder:
        if (here or "transformers.modeling_utils" in sys.modules) and not trust_remote_code:
            from quantize.source.worker_anatomy import examined

            found = examined(folder, source.named, checkpoint, trust_remote_code=False)
        else:
            reporter.say(f"examining the architecture '{checkpoint.model_type}'")
            found = Anatomy.of(_in_child(folder, source, trust_remote_code))
    with suppress(OSError):  # a build says that the cache cannot be written; a plan needs none
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(found.as_data()).encode())
    return found


@contextmanager
def _folder(source: Source) -> Iterator[Path]:
    """A folder with the source's config; one of its own where only headers were fetched."""
    folder = source.checkpoint.folder or source.small_files
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(dict(source.checkpoint.config)), encoding="utf-8")
        yield Path(scratch)


def _in_child(folder: Path, source: Source, trust_remote_code: bool) -> Any:
    arguments = {
        "folder": str(folder.absolute()),
        "named": source.named,
        "config": dict(source.checkpoint.config),
        "tensors": {name: [spec.dtype, list(spec.shape)] for name, spec in source.checkpoint.in_files.items()},
        "trust_remote_code": trust_remote_code,
    }
    worker = Path(__file__).with_name("worker_anatomy.py")
    try:
        answer = run_child(
            Task(
                worker,
                arguments,
                path=[PACKAGE.parent],
                allow_remote_code=trust_remote_code,
                closed=[folder],
                own=[PACKAGE],
            )
        )
    except ChildFailed as error:
        if error.wants_remote_code:
            raise SourceError(
                f"{source.named}: this architecture is code in the model's repo ({', '.join(error.refused)}); read it, "
                "and set `model.trust_remote_code: true` in the recipe to let it run"
            ) from None
        raise SourceError(f"{source.named}: its architecture cannot be examined: {error.reason}") from None
    if "refused" in answer:
        raise SourceError(answer["refused"])
    return answer["anatomy"]
