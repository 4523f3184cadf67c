"""How shards that are not in a local folder are reached and kept: the `store` part of recipes.

Only settings stand here, never credentials: those come from the environment's usual variables, so that no
recipe, checkpoint or log holds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class StoreRecipe:
    """Reaching object stores and HTTP servers; of a local folder only `stage` and where to."""

    endpoint: str = ""
    """Server of the store, such as http://minio:9000; unset: the provider's own, or AWS_ENDPOINT_URL."""
    region: str = ""
    """Region of an S3 bucket; unset: AWS_REGION, else us-east-1."""
    anonymous: bool = False
    """Read a public bucket without credentials; otherwise they come from the environment only."""
    timeout_s: float = 20.0
    """Seconds for one request, its answer's body included (each 8 MiB of a shard that is fetched whole)."""
    retries: int = 5
    """Tries after the first one, for a store that is busy, hangs or cuts its answer."""
    backoff_s: float = 0.2
    """Pause before the first retry; doubled for each further one up to 10 s, and shortened by chance."""
    in_flight: int = 8
    """Reads that one loader process has under way at once."""
    fetch: Literal["auto", "samples", "shards"] = "auto"
    """samples: a range read for each; shards: whole shards into the cache, which wants order block:K; auto:
    samples, unless the server does not honour ranges."""
    cache_dir: str = ""
    """Folder on a disk of this machine for what was read; unset: geopose-dist in XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = 10.0
    """Most that the cache may hold, over all processes of this machine, in units of 10^9 bytes; 0: none."""
    stage: Literal["none", "node"] = "none"
    """node: training first copies all its shards, from a URL or a shared folder, below cache_dir, once per machine and
    before any time-out runs; they stay for later runs. none: samples are read where they are, as they are needed."""
    stage_gb: float = 200.0
    """Most that staged shards of all runs may take on this machine, beside cache_gb, in units of 10^9 bytes."""

    def __post_init__(self) -> None:
        if self.endpoint:
            parts = urlsplit(self.endpoint)
            if "@" in self.endpoint or parts.query or parts.fragment:
                raise ValueError(
                    "store.endpoint holds a user, password or query; wanted http(s)://HOST[:PORT]"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"store.endpoint is {self.endpoint!r}; wanted http(s)://HOST[:PORT]")
        if not 0 < self.timeout_s <= 3600:
            raise ValueError(f"store.timeout_s is {self.timeout_s}; wanted more than 0, and at most 3600")
        if not 0 <= self.retries <= 100:
            raise ValueError(f"store.retries is {self.retries}; wanted 0 to 100")
        if not 0 <= self.backoff_s <= 60:
            raise ValueError(f"store.backoff_s is {self.backoff_s}; wanted 0 to 60")
        if not 1 <= self.in_flight <= 256:
            raise ValueError(f"store.in_flight is {self.in_flight}; wanted 1 to 256")
        if not 0 <= self.cache_gb < float("inf"):
            raise ValueError(f"store.cache_gb is {self.cache_gb}; wanted 0 or more")
        if not 0 < self.stage_gb < float("inf"):
            raise ValueError(f"store.stage_gb is {self.stage_gb}; wanted more than 0")
