"""A model on the hub, at one resolved commit. ``HF_ENDPOINT``, ``HF_TOKEN`` and the hub's own cache apply."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError, SourceError, SourceUnreachableError
from quantize.formats.names import is_file_name
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME, TensorSpec
from quantize.hub.client import COMMIT_ID, check_access, is_missing, why
from quantize.hub.errors import cause_of, status_of
from quantize.hub.retry import Patience, patient
from quantize.recipe.schema import Model
from quantize.reporter import Reporter
from quantize.source.cached import open_cached, remember
from quantize.source.checkpoint import (
    Checkpoint,
    check_dtypes,
    check_files,
    is_carried_over,
    read_checkpoint,
    read_config,
    read_index,
    with_float8,
)
from quantize.source.fingerprints import cached_sha256
from quantize.source.resolved import Source, safe_name


def open_hub(model: Model, *, weights: bool, small_files: bool = False, reporter: Reporter) -> Source:
    """Resolve a hub id to a commit and read it: only headers, or all files that are needed.

    If the hub cannot be reached, a complete revision in the hub's cache is used.

    Raises:
        SourceError: the repo is unknown or private, the revision does not exist, there is no network, or there are
            no safetensors weights.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    check_access(api.endpoint)
    try:
        with patient(Patience(reporter)):
            return _online(model, api, weights=weights, small_files=small_files, reporter=reporter)
    except QuantizeError:
        raise
    except Exception as error:
        reason = _explain(model, api.endpoint, error)
        if reason is None:
            raise
        cause = cause_of(error)
        if cause is not None and (status_of(cause) or 500) >= 500:
            cached = open_cached(model, weights=weights)
            if cached is not None:
                reporter.say(f"{model.source}: {reason}; using commit {str(cached.commit)[:12]} from the HF cache")
                return cached
            reason += f"; {model.revision!r} is not in the HF cache either; a local directory works too"
            raise SourceUnreachableError(f"{model.source}: {reason}") from None
        raise SourceError(f"{model.source}: {reason}") from None


def _online(model: Model, api: Any, *, weights: bool, small_files: bool, reporter: Reporter) -> Source:
    from huggingface_hub import snapshot_download

    info = api.model_info(model.source, revision=model.revision, files_metadata=True)
    commit, beside = str(info.sha), None
    files = {item.rfilename: item for item in info.siblings or []}
    if not COMMIT_ID.fullmatch(commit) or not all(map(is_file_name, files)):
        raise ValueError(commit)
    shards = _shards(model.source, api, commit, files)
    carried = [name for name in files if is_carried_over(name) and not name.startswith(".")]
    hashes = {name: _hash(files[name]) for name in sorted({*shards, *carried, "config.json"} & files.keys())}
    small = [*carried, *({INDEX_NAME, "README.md"} & files.keys()), "config.json"]
    if weights:
        size = sum(files[name].size or 0 for name in shards)
        reporter.say(f"downloading {model.source} at {commit[:12]} ({size / 1e9:.2f} GB)")
        folder = Path(snapshot_download(model.source, revision=commit, allow_patterns=[*shards, *small]))
        checkpoint = read_checkpoint(folder)
        _check_downloads(folder, {name: hashes[name] for name in shards})
        remember(model, commit)
    else:
        checkpoint = _headers(model.source, api, commit)
        if small_files:
            beside = Path(snapshot_download(model.source, revision=commit, allow_patterns=small))
            check_files(beside)
    if "config.json" not in hashes:
        raise SourceError(f"{model.source}: the repo has no config.json")
    return _source(model, checkpoint, commit, hashes, beside)


def _source(
    model: Model, checkpoint: Checkpoint, commit: str, hashes: dict[str, str], beside: Path | None = None
) -> Source:  # fmt: skip
    return Source(
        model.source,
        safe_name(model.source.rsplit("/", 1)[-1]),
        checkpoint,
        commit=commit,
        hub_id=model.source,
        remote_hashes=hashes,
        small_files=beside,
    )


def _shards(repo: str, api: Any, commit: str, files: dict[str, Any]) -> list[str]:
    if INDEX_NAME in files:
        path = api.hf_hub_download(repo, INDEX_NAME, revision=commit)
        names = sorted(set(read_index(Path(path)).values()))
        missing = next((name for name in names if name not in files), None)
        if missing:
            raise SourceError(f"{repo}: its index names the shard {missing}, which the repo does not have")
        return names
    if SINGLE_NAME in files:
        return [SINGLE_NAME]
    if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        raise SourceError(
            f"{repo}: has its weights only as pickle, which can run code when it is read; "
            "use a safetensors revision of the model"
        )
    raise SourceError(f"{repo}: contains no safetensors weights")


def _hash(file: Any) -> str:
    return str(file.lfs.sha256) if file.lfs else f"git:{file.blob_id}"


def _check_downloads(folder: Path, wanted: dict[str, str]) -> None:
    """Check downloaded files, which the hub client does not hash: a damaged shard would ruin every branch."""
    for name, digest in wanted.items():
        if not digest.startswith("git:") and cached_sha256(folder / name) != digest:
            raise SourceError(
                f"{folder / name}: its SHA-256 differs from the hub's; delete the file and download it again"
            )


def _headers(repo: str, api: Any, commit: str) -> Checkpoint:
    from huggingface_hub.errors import SafetensorsParsingError

    path = api.hf_hub_download(repo, "config.json", revision=commit)
    config = read_config(Path(path).parent)
    try:
        metadata = api.get_safetensors_metadata(repo, revision=commit)
    except SafetensorsParsingError as error:
        raise SourceError(f"{repo}: a shard is damaged: {error}") from None
    tensors = {
        key: TensorSpec(tensor.dtype, tuple(tensor.shape), name)
        for name, file in metadata.files_metadata.items()
        for key, tensor in file.tensors.items()
    }
    check_dtypes(tensors, repo)
    return with_float8(Checkpoint(config, tensors, None, tuple(sorted(metadata.files_metadata))), repo)


def _explain(model: Model, endpoint: str, error: Exception) -> str | None:
    """The reason why the hub did not return the model; None for any other error."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return f"the repo has no revision '{model.revision}'"
    if is_missing(error) and not isinstance(error, GatedRepoError):
        return "no such repo on the hub, or it is private; check the name, or log in (`hf auth login`)"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None:
        return "the hub could not be reached, and not all files are in the HF cache"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "the repo has no config.json"
    return why(error, endpoint, model.source)
