"""The recipe of `geopose pack`: what is packed, from where to where, and what decides the bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from geopose_dist.data.store_recipe import StoreRecipe

WAVELET_FACTORS = (2, 4, 8, 16, 32)
"""What a wavelet can reduce by: it halves."""


@dataclass(frozen=True)
class CodecRecipe:
    """How pixels are stored."""

    rgb: Literal["qoi", "png", "htj2k", "webp", "jpg", "gpz", "tiled"] = "qoi"
    """qoi decodes fast, htj2k and webp are smaller; tiled (TIFF) and gpz (ours) decode a crop's window alone; all
    lossless but jpg (quality 95, 4:4:4, a third)."""
    agl: Literal["lerc", "tif", "png", "htj2k", "gpz", "tiled"] = "lerc"
    """Heights in uint16 centimetres, always lossless: lerc decodes fast, tif opens everywhere; tiled, gpz as above."""


@dataclass(frozen=True)
class PackRecipe:
    """What `geopose pack` packs, and how."""

    source: str = ""
    """Dataset: the challenge's folder, the US3D release, or a folder of CITY_ID_RGB.* files."""
    out: str = ""
    """Folder, or s3://, gs:// or az:// prefix, for the shards; run the same command again to go on after a stop."""
    split: str = ""
    """File of `geopose split`; without one every labelled tile is `train`."""
    reduce: int = 2
    """Whole factor by which tiles are reduced: RGB by `reduce_by`, heights registered to the same pixel centres."""
    reduce_by: Literal["area", "wavelet"] = "area"
    """area, or for JPEG 2000 the wavelet's low band moved to the same centres: half the CPU, other pixels."""
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    """How pixels are stored."""
    shard_samples: int = 0
    """Most samples per shard; 0: as many as `shard_mb` allows."""
    shard_mb: int = 256
    """Most megabytes per shard, counted before compression (a tile of 1024 x 1024 counts 5.2)."""
    seed: int = 0
    """Key of the one shuffle."""
    workers: int = 0
    """Processes; 0: one per core of this machine, or of the Ray cluster."""
    ray_address: str = ""
    """Pack on a Ray cluster, `auto` or its address: every node reads `source` and writes `out`, whole shards each."""
    scratch: str = ""
    """Folder for one shard per process on its way to a store; unset: the system's folder for temporary files."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """Reaching the store that `out` names."""
    odd_sizes: Literal["refuse", "crop"] = "refuse"
    """Tiles whose sides are no multiples of `reduce`: an error naming them, or their last pixels go."""
    skip_damaged: int = 0
    """Up to this many damaged tiles are left out and named (exit code 1); one more stops the packing."""
    part: str = "1/1"
    """i/n: pack every n-th shard, for n machines that share nothing but `out`; the last writes the manifest."""
    index_only: bool = False
    """Write manifest and index for the WebDataset shards that stand in `out` already."""
    dry_run: bool = False
    """Look at the dataset and print the plan as JSON; write nothing."""

    def __post_init__(self) -> None:
        if not self.out and not self.dry_run:
            raise ValueError("--out is missing; wanted the folder for the shards")
        if not self.source and not self.index_only:
            raise ValueError("--source is missing; wanted a dataset to pack")
        if self.reduce < 1:
            raise ValueError(f"--reduce is {self.reduce}; wanted a whole number of at least 1")
        if self.reduce_by == "wavelet" and self.reduce not in WAVELET_FACTORS:
            raise ValueError(
                f"--reduce-by wavelet cannot reduce by {self.reduce}; wanted --reduce "
                f"{', '.join(map(str, WAVELET_FACTORS))}, or --reduce-by area"
            )
        if self.shard_samples < 0 or self.shard_mb < 1 or self.skip_damaged < 0 or self.workers < 0:
            raise ValueError(
                "--shard-samples, --skip-damaged and --workers are at least 0, --shard-mb at least 1"
            )
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; wanted at least 0")
        self.part_of()

    def part_of(self) -> tuple[int, int]:
        """`part` as (i, n) with 1 <= i <= n."""
        number, slash, count = self.part.partition("/")
        if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise ValueError(f"--part is {self.part!r}; wanted i/n with 1 <= i <= n, such as 2/8")
        return int(number), int(count)

    def about(self) -> dict[str, Any]:
        """What decides the bytes of the shards; goes into the manifest. No paths: shards travel."""
        # Absent means area, as in manifests written before there was a choice: those packings still go on.
        reduce_by = {} if self.reduce_by == "area" else {"reduce_by": self.reduce_by}
        return {
            "source": Path(self.source).resolve().name,
            "split": Path(self.split).name if self.split else None,
            "reduce": self.reduce,
            "codec": asdict(self.codec),
            "shard_samples": self.shard_samples,
            "shard_mb": self.shard_mb,
            "seed": self.seed,
            "odd_sizes": self.odd_sizes,
            **reduce_by,
        }
