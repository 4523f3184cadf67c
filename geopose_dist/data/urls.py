"""Names of places: which are URLs of stores, which are folders, and which are refused.

A URL is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or http(s)://HOST/PATH, and nothing
else: no shell (`pipe:`), no file:, no user or password, no query (signed URLs hold secrets and cannot be
extended by a shard's name), no way up. What is shown to people goes through `shown`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from geopose_dist.errors import UserError

SCHEMES = ("s3", "gs", "az", "http", "https")
WANTED = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, http(s)://HOST/PATH, or a folder"

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)(?P<mark>://|:)")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")


@dataclass(frozen=True)
class Url:
    """A checked URL: scheme, bucket (container, or host and port), and path without slashes at its ends."""

    scheme: str
    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}" + (f"/{self.path}" if self.path else "")


def is_url(place: str) -> bool:
    """Whether `place` is meant as a URL of any kind, allowed or not; a colon in a folder's name is none."""
    match = _SCHEME.match(place)
    return bool(match) and (match["mark"] == "://" or match["scheme"].lower() == "pipe")  # type: ignore[index]


def shown(place: str) -> str:
    """A place as it may be printed: without user, password and query."""
    if not is_url(place):
        return place
    return _SECRET.sub("***@", place).partition("?")[0].partition("#")[0]


def parse(place: str) -> Url:
    """A URL taken apart, or refused by name (UserError)."""
    safe = shown(place)
    match = _SCHEME.match(place)
    scheme = match["scheme"].lower() if match else ""
    if scheme == "file":
        raise UserError(f"{safe}: file: URLs are refused; name the folder itself, without file://")
    if scheme not in SCHEMES or not place.lower().startswith(f"{scheme}://"):
        raise UserError(f"{safe}: {scheme or 'that'}: is refused; wanted {WANTED}")
    if re.search(r"[\x00-\x20\x7f\\]", place):
        raise UserError(f"{safe!r}: blanks, backslashes and control characters in a URL are refused")
    try:
        parts = urlsplit(place)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{safe}: not a URL ({error}); wanted {WANTED}") from error
    if "@" in parts.netloc:
        raise UserError(
            f"{safe}: a user or password in a URL is refused, because URLs end up in recipes and logs; give "
            "credentials by the environment's variables (AWS_ACCESS_KEY_ID, ...)"
        )
    if parts.query or parts.fragment or "?" in place or "#" in place:
        raise UserError(f"{safe}: a query or fragment in a URL of shards is refused; wanted {WANTED}")
    web = scheme in ("http", "https")
    if not (parts.hostname if web else _BUCKET.fullmatch(parts.netloc)):
        raise UserError(f"{safe}: names no {'host' if web else 'bucket'}; wanted {WANTED}")
    assert port is None or web or _BUCKET.fullmatch(parts.netloc)
    path = parts.path.strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise UserError(f"{safe}: '..', '.' and empty parts in a URL are refused; wanted {WANTED}")
    return Url(scheme, parts.netloc, path)


def check_name(name: str, where: str) -> str:
    """A name below a prefix, such as `train-000000.tar` or `step/model.safetensors` (UserError otherwise)."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    if not plain or name in ("", ".") or re.search(r"[\x00-\x1f\x7f\\?#%]", name):
        raise UserError(f"{shown(where)}: the name {name!r} points out of its place or is not plain; refused")
    return name


def join(place: str, name: str) -> str:
    """A name below a folder or URL, for messages."""
    return f"{shown(place).rstrip('/')}/{name}"
