"""The two parts of llama.cpp used here: its converter (a source tree) and its quantizer (package llama-cpp-python).

Both come from one pinned version, so that the quantizer reads the converter's files. The tree is the user's checkout
(``LLAMA_CPP_DIR``), or is extracted once into the cache from the package's source distribution, whose hash is pinned.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from quantize.errors import GgufError
from quantize.files.cache import cache_folder
from quantize.files.child import computing_environment
from quantize.files.digest import sha256_of_file
from quantize.reporter import SILENT, Reporter

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
HOW = (
    f'CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python=={VERSION} sentencepiece '
    "(compiling takes some minutes), or run `make setup`"
)
_WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


def missing_library() -> str | None:
    """One sentence on how to install the quantizer, or None if it is installed."""
    lacking = [name for name in ("llama_cpp", "sentencepiece") if not _installed(name)]
    if not lacking:
        return None
    return f"GGUF needs the package{'s' if len(lacking) > 1 else ''} {' and '.join(lacking)}: {HOW}"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def require_library() -> None:
    """Raise :class:`GgufError`, with how to install it, if the quantizer is missing."""
    if reason := missing_library():
        raise GgufError(reason)


def tree(reporter: Reporter = SILENT) -> Path:
    """The folder with ``convert_hf_to_gguf.py``, ``conversion/`` and ``gguf-py/``.

    Raises:
        GgufError: LLAMA_CPP_DIR is not such a tree, or the source distribution cannot be downloaded.
    """
    own = os.environ.get("LLAMA_CPP_DIR")
    if own:
        folder = Path(own).expanduser()
        if not (folder / "conversion").is_dir() or not (folder / "gguf-py" / "gguf").is_dir():
            raise GgufError(
                f"LLAMA_CPP_DIR={own}: is not a llama.cpp source tree with conversion/ and gguf-py/; "
                "point it to a recent checkout, or unset it"
            )
        return folder
    folder = cache_folder() / "llama.cpp" / VERSION
    if not (folder / "conversion").is_dir():
        reporter.say(f"downloading llama.cpp's converter from llama-cpp-python {VERSION} (77 MB, only once)")
        _provision(folder)
    return folder


def tree_identity() -> str:
    """The converter's identity for keys: the pinned version, or a hash of the user's checkout."""
    own = os.environ.get("LLAMA_CPP_DIR")
    if not own:
        return f"llama-cpp-python {VERSION}"
    base = tree() / "conversion" / "base.py"
    return f"own tree {sha256_of_file(base)[:16]}"


def _provision(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = download_sdist(Path(scratch))
        unpacked = Path(scratch) / "tree"
        with tarfile.open(archive) as tar:
            for member in tar:
                _, _, inside = member.name.partition("/vendor/llama.cpp/")
                if member.isfile() and inside.startswith(_WANTED):
                    source = tar.extractfile(member)
                    assert source is not None
                    target = unpacked / inside
                    if not target.resolve().is_relative_to(unpacked.resolve()):
                        raise GgufError(f"{archive.name}: contains a path outside its folder, {member.name}")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read())
        if not (unpacked / "conversion").is_dir():
            raise GgufError(
                f"{archive.name}: contains no llama.cpp converter; set LLAMA_CPP_DIR to a llama.cpp checkout"
            )
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unpacked, folder)


def download_sdist(folder: Path) -> Path:
    """The source distribution with the pinned hash, from QUANTIZE_LLAMA_SDIST or the package index."""
    given = os.environ.get("QUANTIZE_LLAMA_SDIST")
    if given:
        archive = Path(given)
    else:
        requirement = folder / "requirement.txt"
        requirement.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        command = [
            sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
            "--no-binary", "llama-cpp-python", "--require-hashes", "--dest", str(folder),
            "--requirement", str(requirement),
        ]  # fmt: skip
        environment = {**computing_environment(network=True), "HOME": str(Path.home())}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
        found = list(folder.glob("llama_cpp_python-*.tar.gz"))
        if not found:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
            raise GgufError(
                f"llama-cpp-python {VERSION}: its source distribution cannot be downloaded ({lines[0][:200]}); "
                "set LLAMA_CPP_DIR to a llama.cpp checkout"
            )
        archive = found[0]
    if not archive.is_file() or sha256_of_file(archive) != SHA256:
        raise GgufError(f"{archive}: is not the pinned source distribution of llama-cpp-python {VERSION}")
    return archive
