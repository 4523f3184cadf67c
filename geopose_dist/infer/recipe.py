"""What `geopose predict` may be told; no torch here, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from geopose_dist.data.store_recipe import StoreRecipe

LARGEST_SCALE_PX_PER_M = 3.0
"""px/m; larger ones, written in px/cm, would look like a mix-up of units to every reader of the files."""
LARGEST_AGL_M = 655.34
"""The tallest height that uint16 centimetres hold."""


@dataclass(frozen=True)
class NetRecipe:
    """How a batch becomes heights, angles and scales."""

    tta: Literal["none", "flips", "dihedral"] = "none"
    """Also predict mirrored images and average: none, the four flips, or all eight symmetries of a square."""
    weights: list[float] = field(default_factory=list)
    """Weight of each checkpoint in the average of several; empty means equal."""
    window: int = 1024
    """Larger tiles (in reduced pixels) are predicted by overlapping windows of this side."""
    overlap: int = 256
    """Pixels that neighbouring windows share. Each fades in over the middle half of it, so what lies within a
    quarter of it from a window's border is not used: make that the network's receptive field, and windows
    give what the whole tile would."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic inside the network; bf16 is the faster one on GPUs and recent CPUs."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """Compile the networks by torch before the first batch, in this mode; worth its minutes for many tiles of one
    size on a GPU."""
    enlarge: Literal["guided", "bilinear", "slopes"] = "guided"
    """How heights of a reduced network return to full size: along the edges of the image (bilinear where only the
    reduced image is there, as in reduced shards), bilinear, or as planes limited at edges."""
    calibration: Literal["none", "factor", "curve"] = "none"
    """Correct heights as `geopose calibrate` fitted for each checkpoint: by a factor per city, or a monotone curve."""
    agl_max_m: float = LARGEST_AGL_M
    """Heights are clipped to 0 .. this many metres; clipped pixels are counted and told."""
    scale_min_px_per_m: float = 0.01
    """Scales (px/m at full resolution) are limited to this and the next; hits are counted and told."""
    scale_max_px_per_m: float = LARGEST_SCALE_PX_PER_M
    """Upper limit of scales."""

    def __post_init__(self) -> None:
        if self.window < 64 or self.window % 32:
            raise ValueError(f"net.window is {self.window}; wanted a multiple of 32, at least 64")
        if not 0 <= self.overlap <= self.window // 2:
            raise ValueError(
                f"net.overlap is {self.overlap}; wanted 0 to half of net.window, {self.window // 2}"
            )
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"net.weights is {self.weights}; wanted numbers above 0")
        if not 0 < self.agl_max_m <= LARGEST_AGL_M:
            raise ValueError(f"net.agl_max_m is {self.agl_max_m}; wanted above 0 and at most {LARGEST_AGL_M}")
        if not 0 < self.scale_min_px_per_m < self.scale_max_px_per_m <= LARGEST_SCALE_PX_PER_M:
            raise ValueError(
                f"net.scale_min_px_per_m .. net.scale_max_px_per_m is {self.scale_min_px_per_m} .. "
                f"{self.scale_max_px_per_m}; wanted 0 < min < max <= {LARGEST_SCALE_PX_PER_M}"
            )


@dataclass(frozen=True)
class PredictRecipe:
    """Predict heights, angles and scales of many tiles."""

    source: str
    """A dataset folder (challenge layout: its test tiles, unless `split` says otherwise), a CSV list with a column
    rgb, shards in a folder or behind a URL, one image file, or georeferenced GeoTIFFs of any size (scenes): one, a
    folder or a list of them."""
    checkpoint: list[str]
    """One or more checkpoints, averaged: .safetensors files, or runs, in a folder or at s3://, gs:// or az:// (their
    best checkpoint, else their newest)."""
    out: Path
    """Folder for KEY_AGL.tif and KEY_VFLOW.json; finished tiles found there are not predicted again."""
    scenes: Literal["auto", "always", "never"] = "auto"
    """Scenes are read by window and get one pose and GeoTIFFs each. auto: georeferenced or very large TIFFs, if all
    images of the source are; never: everything is a tile, read whole."""
    split: str = ""
    """Part of the source: test, train, all, or a split of the shards; empty: test if there is one, else all."""
    limit: int = 0
    """Predict only the first so many tiles or scenes by name; 0 means all."""
    batch: int = 4
    """Tiles predicted together. The last centimetre of an output may depend on it, but never on who
    died, or when."""
    workers: int = 0
    """Actors, each holding the networks; 0: one per GPU, or without GPU one per two cores."""
    threads: int = 0
    """Threads of an actor's arithmetic on CPU; 0 shares the cores among the actors."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    dispatch: Literal["ray", "process", "inline"] = "ray"
    """ray: Ray actors; process: the same in plain processes; inline: one in this process, to debug."""
    ray_address: str = ""
    """Address of a running Ray cluster, as auto or HOST:6379; empty starts Ray on this machine only."""
    attempts: int = 3
    """How often a batch that kills its actor is tried before its tiles are tried one by one."""
    item_timeout_s: float = 900.0
    """An actor that has not answered for a batch in this time, and in as much for each batch before it, is given up;
    another tries the batch."""
    unit: Literal["cm", "m"] = "cm"
    """cm: challenge files; m: float32 metres and px/m, which `geopose convert` takes."""
    dry_run: bool = False
    """Tell what would be done, and write nothing."""
    overwrite: bool = False
    """Predict again what is there already, even if another checkpoint made it; all that another one made is
    removed first."""
    rectify: bool = True
    """Scenes: also write heights and colours moved to the ground, and what is hidden, into OUT/rectified."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """How shards and checkpoints behind a URL are reached and kept."""
    net: NetRecipe = field(default_factory=NetRecipe)
    """How a batch is predicted."""

    ALIASES: ClassVar[Mapping[str, str]] = {"calibration": "net.calibration"}

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; name at least one checkpoint or run folder")
        if self.net.weights and len(self.net.weights) != len(self.checkpoint):
            raise ValueError(
                f"net.weights holds {len(self.net.weights)} numbers for {len(self.checkpoint)} checkpoints; "
                "wanted one each"
            )
        for name, least in (("batch", 1), ("attempts", 1), ("workers", 0), ("threads", 0), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted {least} or more")
        if not self.item_timeout_s > 0:
            raise ValueError(f"item_timeout_s is {self.item_timeout_s}; wanted above 0")
