"""Zip archives of images: members by name, read up to a limit whatever the archive's headers claim."""

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from ..core.errors import DataError, UsageError
from ..core.machine import library
from .images import MAX_FILE_BYTES


def zip_members(path: Path) -> dict[str, Callable[[], bytes]]:
    """File name -> its reader, folders left out. Readers raise DataError: too large, damaged, encrypted.

    Raises UsageError: not a zip. DataError: two members of one name, of which only one could be meant.
    """
    with library(f"{path} is no zip that can be read", UsageError):
        archive = zipfile.ZipFile(path)
    members: dict[str, Callable[[], bytes]] = {}
    twice = []
    for info in archive.infolist():
        name = str(PurePosixPath(info.filename.replace("\\", "/")))
        if name in members:
            twice.append(name)
        if not info.filename.endswith("/"):  # a folder's does; is_dir() of a name that is empty raises
            members[name] = partial(_read, archive, info, path)
    if twice:
        raise DataError(f"{path} holds several members called {', '.join(twice[:5])}", hint="pack it again")
    return members


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    with library(f"{path}: cannot read {info.filename}"), archive.open(info) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{path}: {info.filename} is larger than {MAX_FILE_BYTES / 2**20:.0f} MB unpacked")
    return data
