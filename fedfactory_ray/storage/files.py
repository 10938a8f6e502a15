"""A run's folder: local, shared, s3:// or gs://, through pyarrow.fs; files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import random
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs

from fedfactory_ray.errors import StorageError

log = logging.getLogger(__name__)
TEMPORARY = ".tmp"
NEEDED = "a local path, or an address such as s3://bucket/folder, gs://bucket/folder or file:///folder"
BID_SECONDS = 30.0
"""A bid for a name that is older than this was left by a killed process."""
MISTYPED = re.compile(r"(s3|gs|gcs|abfss?|hdfs|file)(:/?|//)(?!/)")


class Storage:
    """Files below one folder, by relative path. Pickles as its URI, so that workers open it themselves.

    Raises StorageError for an address that tells no file system, and for a folder that cannot be written to.
    """

    def __init__(self, uri: str) -> None:
        if MISTYPED.match(uri):
            raise StorageError(uri, "an address without ://", NEEDED)
        self.uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
        try:
            self.filesystem, self.root = fs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:  # pyarrow's too
            raise StorageError(self.uri, _line(error), NEEDED) from error

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def path(self, name: str) -> str:
        """Path of `name` inside the file system. Raises StorageError for a name that would lead out of this folder."""
        return posixpath.join(self.root, self._inner(name))

    def _inner(self, name: str) -> str:
        if name and (set(name.split("/")) & {"", ".", ".."} or not name.isprintable()):
            raise StorageError(self.uri, f"the name {name!r}", "the name of a file or folder within it")
        return name

    def within(self, name: str) -> Storage:
        """The folder `name` as a storage of its own. Options of the address (`?endpoint_override=…`) stay."""
        address, options = _split(self.uri)
        return Storage(f"{address.rstrip('/')}/{self._inner(name)}{options}")

    @property
    def name(self) -> str:
        """The folder's own name."""
        return posixpath.basename(_split(self.uri)[0].rstrip("/"))

    @property
    def parent(self) -> Storage:
        """The folder that this one lies in."""
        address, options = _split(self.uri)
        return Storage(posixpath.dirname(address.rstrip("/")) + options)

    def check(self) -> None:
        """Raise StorageError where nothing could be written here, and write nothing."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            there = next(place for place in (Path(self.root), *Path(self.root).parents) if place.exists())
            if not there.is_dir():
                raise StorageError(self.uri, f"{there} is a file", "a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise StorageError(self.uri, f"{there} may not be written", "a folder of your own")
            return
        bucket = self.root.partition("/")[0]
        try:
            there = self.filesystem.get_file_info(bucket).type
        except OSError as error:
            raise StorageError(self.uri, _line(error), f"a bucket {bucket} that may be read and written") from error
        if there == fs.FileType.NotFound:
            raise StorageError(self.uri, f"no bucket {bucket}", "a bucket that is there")

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there, whole."""
        return bool(self.filesystem.get_file_info(self.path(name)).type == fs.FileType.File)

    def names(self, folder: str) -> list[str]:
        """Relative names of all files below `folder`, sorted."""
        selector = fs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(posixpath.relpath(f.path, self.root) for f in found if f.type == fs.FileType.File)

    def entries(self, folder: str) -> dict[str, bool]:
        """Relative names of what lies in `folder` itself, of whatever kind, sorted; and whether each is a folder."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        found = sorted(self.filesystem.get_file_info(selector), key=lambda f: f.path)
        return {posixpath.relpath(f.path, self.root): f.type == fs.FileType.Directory for f in found}

    def is_plain(self, name: str) -> bool:
        """Whether a file of that name is there, and is no link: on a disk it might lead anywhere."""
        link = isinstance(self.filesystem, fs.LocalFileSystem) and os.path.islink(self.path(name))
        return self.exists(name) and not link

    def read(self, name: str) -> bytes:
        """Content of a file."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A stream into a temporary file, which takes its name when the block ends well and is deleted otherwise."""
        target = self.path(name)
        temporary = f"{target}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            self.filesystem.create_dir(posixpath.dirname(target), recursive=True)
            stream = self.filesystem.open_output_stream(temporary)
        except OSError as error:
            raise StorageError(self.uri, _line(error), "a place that may be written") from error
        try:
            with stream:
                yield stream
        except BaseException:
            self.filesystem.delete_file(temporary)
            raise
        self._put(temporary, target)

    def _put(self, temporary: str, target: str) -> None:
        """Give a finished temporary file its name; on a disk only when its bytes are there, lest a power failure leaves
        the name of an empty file."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            _sync(temporary)
        self.filesystem.move(temporary, target)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless one of that name is there, of several who try at once for one alone; whether it was here.

        Disks and shared folders link a whole file to its name, which fails where there is one. For object stores
        pyarrow has no conditional put, so there each lays down a bid and lists the bids: who is alone may write, others
        take theirs back and try again. Stores list what was written before, so no two find themselves alone.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            return self._link(name, content)
        began = time.monotonic()
        while not self.exists(name):
            bid, since = f"{name}.{uuid.uuid4().hex}.bid{TEMPORARY}", time.monotonic()
            with self.filesystem.open_output_stream(self.path(bid)) as stream:
                stream.write(content)
            alone = self._bids(name) == [self.path(bid)]
            # Whoever was held up so long may have been taken for dead.
            won = alone and not self.exists(name) and time.monotonic() - since < BID_SECONDS / 2
            if won:
                self.write(name, content)
            self.filesystem.delete_file(self.path(bid))
            if won:
                return True
            if time.monotonic() - began > 4 * BID_SECONDS:
                raise StorageError(self.uri, f"others that want to write {name} too", "the same command, later")
            time.sleep(random.uniform(0.05, 0.5))
        return False

    def _bids(self, name: str) -> list[str]:
        """Paths of the bids for a name, less those of killed processes, by the store's own clock."""
        found = self.filesystem.get_file_info(fs.FileSelector(posixpath.dirname(self.path(name)), allow_not_found=True))
        bids = [f for f in found if f.path.startswith(f"{self.path(name)}.") and f.path.endswith(f".bid{TEMPORARY}")]
        newest = max((f.mtime_ns for f in bids), default=0)
        return [f.path for f in bids if newest - f.mtime_ns < BID_SECONDS * 1e9]

    def _link(self, name: str, content: bytes) -> bool:
        target = self.path(name)
        temporary = f"{target}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            os.makedirs(posixpath.dirname(target), exist_ok=True)
            Path(temporary).write_bytes(content)
        except OSError as error:
            raise StorageError(self.uri, _line(error), "a place that may be written") from error
        try:
            _sync(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links; there the file appears first, and then its content
                with open(target, "xb") as stream:
                    stream.write(content)
                _sync(target)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(self.uri, _line(error), "a place that may be written") from error
        finally:
            os.unlink(temporary)
        return True

    def write(self, name: str, content: bytes) -> str:
        """Write a file at once, atomically; returns the SHA-256 of its content."""
        with self.writing(name) as stream:
            stream.write(content)
        return hashlib.sha256(content).hexdigest()

    def copy(self, origin: Storage, name: str) -> None:
        """Copy a file of another folder of the same file system, atomically and without reading it here."""
        target = self.path(name)
        temporary = f"{target}.{uuid.uuid4().hex}{TEMPORARY}"
        self.filesystem.create_dir(posixpath.dirname(target), recursive=True)
        self.filesystem.copy_file(origin.path(name), temporary)
        self._put(temporary, target)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with all that it holds, if it is there."""
        if self.names(name):
            self.filesystem.delete_dir(self.path(name))

    def prune(self) -> None:
        """Delete the folders in which no file is left."""
        kept = {posixpath.join(self.root, name) for name in self.names("")}
        selector = fs.FileSelector(self.root, allow_not_found=True)
        for found in self.filesystem.get_file_info(selector):
            if found.type == fs.FileType.Directory and not any(name.startswith(f"{found.path}/") for name in kept):
                self.filesystem.delete_dir(found.path)

    def clean(self, before: int) -> None:
        """Delete the temporary files that killed writers left, last written before a time (`written`)."""
        for found in self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True, allow_not_found=True)):
            if found.type == fs.FileType.File and found.path.endswith(TEMPORARY) and found.mtime_ns < before:
                self.filesystem.delete_file(found.path)

    def written(self, name: str) -> int:
        """When a file was last written, in nanoseconds by the clock of whoever keeps it; 0 where it is not there."""
        found = self.filesystem.get_file_info(self.path(name))
        return int(found.mtime_ns) if found.type == fs.FileType.File else 0

    def age(self, name: str) -> float:
        """Seconds since a file was last written, by the clock of whoever keeps it: that of a file written now; 0 where
        it is not there."""
        probe = f"{name}.{uuid.uuid4().hex}{TEMPORARY}"
        with self.filesystem.open_output_stream(self.path(probe)) as stream:
            stream.write(b"now")
        try:
            then = self.written(name)
            return (self.written(probe) - then) / 1e9 if then else 0.0
        finally:
            self.filesystem.delete_file(self.path(probe))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self.filesystem.get_file_info(self.path(name)).size)

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, read in pieces."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON with sorted keys: equal values give equal bytes."""
        self.write(name, json.dumps(value, indent=2, sort_keys=True).encode())

    def read_again(self, name: str, otherwise: Any) -> Any:
        """Read a JSON file of the type of `otherwise`, which is taken where there is none, or a damaged one: that is
        told by its path, and whoever asks makes the file anew."""
        if not self.exists(name):
            return otherwise
        try:
            found = self.read_json(name)
        except StorageError as error:
            log.warning("%s is made anew: %s", f"{self.uri}/{name}", error.found)
            return otherwise
        if type(found) is not type(otherwise):
            log.warning("%s is made anew: found a %s", f"{self.uri}/{name}", type(found).__name__)
            return otherwise
        return found

    def read_json(self, name: str) -> Any:
        """Read a JSON file. Raises StorageError, which tells its path, where it holds none."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
            raise StorageError(
                f"{self.uri}/{name}", f"no JSON ({_line(error)})", "the file as it was written"
            ) from error


def _sync(path: str) -> None:
    """Wait until a file's bytes are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _line(error: Exception) -> str:
    """The first line of what a file system says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _split(uri: str) -> tuple[str, str]:
    """An address, and its options with their question mark; a local path has none."""
    address, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return address, mark + options
