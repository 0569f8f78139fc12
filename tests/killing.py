"""``killing.py RECIPE``: builds in forked children, each killed at a chosen moment by its own hand.

A moment is a call that changes the disk. For each line of JSON on stdin, ``{"dist": ..., "moment": N or null}``, a
line on stdout: how the child ended, the kinds of its moments in order, and what it said.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from reporting import Printing

KINDS = ("pwrite", "fsync", "replace", "rename", "unlink", "mkdir")


def watch(moments: list[str], last: int | None) -> None:
    """Note every call; at number ``last`` do half of it, or nothing, or all of it, and die."""
    for kind in KINDS:
        real = getattr(os, kind)

        def call(*arguments: Any, _kind: str = kind, _real: Callable[..., Any] = real, **options: Any) -> Any:
            moments.append(_kind)
            if len(moments) == last:
                if _kind == "pwrite":
                    _real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                elif last % 2:
                    with contextlib.suppress(OSError):
                        _real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return _real(*arguments, **options)

        setattr(os, kind, call)


def build(recipe: str, wish: dict[str, Any]) -> dict[str, Any]:
    """One build in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said, moments, error = io.StringIO(), [], None
        from quantize.building import build_recipe
        from quantize.options import BuildOptions
        from quantize.recipe import load_recipe

        watch(moments, wish["moment"])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                build_recipe(load_recipe(recipe), BuildOptions(dist=wish["dist"], device="cpu"), Printing())
            except BaseException as failure:
                error = repr(failure)
        with os.fdopen(writer, "w") as pipe:
            json.dump({"moments": moments, "said": said.getvalue(), "error": error}, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), **(json.loads(text) if text else {})}


if __name__ == "__main__":
    # everything heavy once; no tensor is computed before the fork, after which torch's threads would be gone
    import transformers.conversion_mapping
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantize.building.resumable_pass  # noqa: F401
    import quantize.gguf.check  # noqa: F401
    import quantize.methods.kernel  # noqa: F401
    import quantize.publishing.card  # noqa: F401

    transformers.AutoTokenizer, transformers.AutoModelForCausalLM  # noqa: B018  looked up on first use

    gc.freeze()  # what is loaded stays, and the children share its memory as long as nobody looks through it
    gc.set_threshold(50_000, 20, 20)
    for line in sys.stdin:
        print(json.dumps(build(sys.argv[1], json.loads(line))), flush=True)
