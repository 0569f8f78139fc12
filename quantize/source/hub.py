"""A model on the hub, at one resolved commit. ``HF_ENDPOINT``, ``HF_TOKEN`` and the hub's own cache apply."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from quantize.errors import SourceError, SourceUnreachableError
from quantize.files.digest import cached_sha256
from quantize.files.notify import Notify
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME, TensorSpec
from quantize.hub.client import is_network
from quantize.recipe.schema import Model
from quantize.source.checkpoint import (
    Checkpoint,
    check_dtypes,
    is_carried_over,
    read_checkpoint,
    read_config,
    read_index,
)
from quantize.source.resolved import Source, safe_name


def open_hub(model: Model, *, weights: bool, small_files: bool = False, notify: Notify) -> Source:
    """Resolve a hub id to a commit and read it: headers alone, or the files it needs.

    Raises:
        SourceError: unknown or private repo, no such revision, no network, no safetensors weights.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    beside = None
    try:
        info = api.model_info(model.source, revision=model.revision, files_metadata=True)
        commit = str(info.sha)
        files = {item.rfilename: item for item in info.siblings or []}
        shards = _shards(model.source, api, commit, files)
        carried = [name for name in files if is_carried_over(name) and not name.startswith(".")]
        index = [INDEX_NAME] if INDEX_NAME in files else []
        if weights:
            size = sum(files[name].size or 0 for name in shards)
            notify(f"downloading {model.source} at {commit[:12]} ({size / 1e9:.2f} GB)")
            needed = [
                *shards,
                *carried,
                *index,
                "config.json",
                *(["README.md"] if "README.md" in files else []),
            ]
            folder = Path(snapshot_download(model.source, revision=commit, allow_patterns=needed))
            checkpoint = read_checkpoint(folder)
            _check_downloads(folder, {name: files[name].lfs for name in shards})
        else:
            checkpoint = _headers(model.source, api, commit)
            small = [*carried, *index, "config.json", *(["README.md"] if "README.md" in files else [])]
            if small_files:
                beside = Path(snapshot_download(model.source, revision=commit, allow_patterns=small))
    except Exception as error:
        if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OSError) or is_network(error):
            raise _explained(model, error) from None
        raise
    hashes = {name: _hash(files[name]) for name in sorted([*shards, *carried, "config.json"])}
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
            f"{repo}: holds its weights only as pickle, which can run code when it is read; "
            "use a safetensors revision of the model"
        )
    raise SourceError(f"{repo}: holds no safetensors weights")


def _hash(file: Any) -> str:
    return str(file.lfs.sha256) if file.lfs else f"git:{file.blob_id}"


def _check_downloads(folder: Path, wanted: dict[str, Any]) -> None:
    """The hub client does not hash what it downloads; a silently damaged shard would ruin every branch."""
    for name, lfs in wanted.items():
        if lfs is not None and cached_sha256(folder / name) != lfs.sha256:
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
    return Checkpoint(config, tensors, None, tuple(sorted(metadata.files_metadata)))


def _explained(model: Model, error: Exception) -> SourceError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{model.source}: "
    if isinstance(error, GatedRepoError):
        return SourceError(where + "the repo is gated; accept its terms on the hub and log in (`hf auth login`)")
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(
            where + "no such repo on the hub, or it is private; check the name, or log in (`hf auth login`)"
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(where + f"the repo has no revision '{model.revision}'")
    if isinstance(error, EntryNotFoundError):
        return SourceError(where + "the repo has no config.json")
    reason = " ".join(str(error).split())[:200]
    return SourceUnreachableError(
        where + f"the hub could not be reached ({type(error).__name__}: {reason}); a local directory works too"
    )
