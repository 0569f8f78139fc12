"""A branch's files for the hub client, each read once: we hash the bytes while the client sends them, and the last ones
are sent only if the hash is the manifest's.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from quantize.publishing.finished import SMALL, LocalFile


class Checked(io.RawIOBase):
    """A file that is hashed while it is read, and withholds its last bytes if the hash is wrong.

    It can be read again from an earlier position, for repeated uploads.
    """

    def __init__(self, inner: BinaryIO, file: LocalFile) -> None:
        import hashlib

        self.inner, self.file, self.digest, self.hashed = inner, file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.inner.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.inner.seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        start = self.inner.tell()
        data = self.inner.read(-1 if size is None else size)
        end = start + len(data)
        if start <= self.hashed < end:
            self.digest.update(memoryview(data)[self.hashed - start :])
            self.hashed = end
        if end >= self.file.nbytes:
            if self.hashed != self.file.nbytes or self.digest.hexdigest() != self.file.sha256:
                raise self.file.differs()
            self.file.checked = True
        if not data and size != 0 and end < self.file.nbytes:
            raise self.file.differs(f"{end:,} bytes in place of {self.file.nbytes:,}")
        return data


def addition(name: str, file: LocalFile) -> Any:
    """The operation that adds a file to a commit.

    Raises:
        ReleaseError: a small file is not what was built; for a large file it is raised while the file is sent.
    """
    from huggingface_hub import CommitOperationAdd

    if file.nbytes <= SMALL:
        return CommitOperationAdd(name, file.read())
    return _large()(name, file)


def _large() -> type:
    """The operation class for a large file; defined here because the client is imported on use."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    class Info(UploadInfo):
        """Knows the SHA-256 without reading. Xet computes it again while reading, and must get the same."""

        def __init__(self, size: int, sample: bytes, file: LocalFile) -> None:
            self.size, self.sample, self.file = size, sample, file
            self._sha256 = None

        @property
        def sha256(self) -> bytes:
            return bytes.fromhex(self.file.sha256)

        @sha256.setter
        def sha256(self, value: bytes) -> None:
            if value.hex() != self.file.sha256:
                raise self.file.differs()
            self.file.checked = True

        @property
        def is_hashed(self) -> bool:
            return False

    class Large(CommitOperationAdd):
        def __init__(self, name: str, file: LocalFile) -> None:
            self.file = file
            super().__init__(name, str(file.path.absolute()))
            self.upload_info = Info(self.upload_info.size, self.upload_info.sample, file)

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            with super().as_file(with_tqdm) as inner:
                yield cast("BinaryIO", Checked(inner, self.file))

    return Large
