"""What may be wrong with the labels of synthetic tiles, on request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultRecipe:
    """Faults of the labels, as real ones have them. The truth of test tiles has them too."""

    holes: bool = True
    """Pixels without height (65535) where a lidar has none: blobs, ends of flight strips, some walls, some water."""
    speckle: float = 0.0
    """Share of single pixels without height, scattered over the tile."""
    date: float = 0.0
    """Share of buildings that came or went between the lidar and the image: half new, half gone."""

    def __post_init__(self) -> None:
        for name in ("speckle", "date"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"faults.{name} is {getattr(self, name)}; wanted a share of at least 0 and below 1"
                )
