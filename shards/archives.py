"""Archives of a dataset (`train.tar.gz`) unpacked once into a dot-folder beside them.

Only plain files with harmless names are taken out, one by one, into one flat folder: nothing in an archive
can choose where it lands. The folder takes its name when the archive has been read to its end; a stamp of
the archive's size and time says whether it is still the same one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from geopose_dist import files
from geopose_dist.errors import UserError

CACHE = ".geopose"
"""Dot-folder in the dataset that holds what was unpacked."""
MAX_MEMBER_BYTES = 1 << 30


def unpacked(archive: Path) -> Path:
    """The flat folder with the files of `NAME.tar.gz`, made at the first call (UserError)."""
    name = archive.name.removesuffix(".tar.gz")
    folder = archive.parent / CACHE / name
    stamp_file = archive.parent / CACHE / f"{name}.json"
    facts = archive.stat()
    stamp = json.dumps({"bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}).encode()
    if folder.is_dir() and stamp_file.is_file() and stamp_file.read_bytes() == stamp:
        return folder
    print(f"unpacking {archive} into {folder}, once", file=sys.stderr, flush=True)
    temporary = folder.with_name(f"{name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _unpack(archive, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        files.write_bytes(stamp_file, stamp)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{archive}: the disk is full while unpacking it into {folder}; free some space"
            ) from error
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"{archive}: cannot be unpacked beside itself ({error.strerror}: {folder}); unpack it by hand, "
            f"`tar xzf {archive.name}`, or copy the dataset to where you may write"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if not member.isdir():
                    _take(tar, member, folder, archive)
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive}: damaged or cut short ({error}); fetch it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{archive}: damaged or not gzip ({error}); fetch it again") from error  # BadGzipFile


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    path = PurePosixPath(member.name)
    if not member.isreg():
        raise UserError(f"{archive}: member {member.name!r} is a link or device; such archives are refused")
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise UserError(f"{archive}: member name {member.name!r} points out of its folder; refused")
    if member.size > MAX_MEMBER_BYTES:
        raise UserError(f"{archive}: member {member.name!r} claims {member.size} bytes; refused")
    if path.name.startswith("."):
        return  # resource forks and the like, which some archivers add
    target = folder / path.name
    if target.exists():
        raise UserError(f"{archive}: two files for one name, {path.name}; remove one of them")
    source = tar.extractfile(member)
    assert source is not None
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
