"""What `geopose bench submission` may be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SubmissionRecipe:
    """The test set from J2K files to submission.tar.gz in one go."""

    tiles: int = 1025
    """Tiles of the test set; the challenge has 1,025."""
    side: int = 2048
    """Their side in pixels."""
    distinct: int = 32
    """Different images among them; the others are further names of these, decoded like any other."""
    megabytes: float = 2.0
    """Size of a J2K tile of 2048 px, reached by the quality; 0: lossless."""
    encoder: str = "resnet34"
    """The network's encoder, weights at random: they change no time."""
    sample: int = 8
    """Tiles for the benchmark's way of three blocking steps, told per tile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""

    def __post_init__(self) -> None:
        least = min(self.tiles, self.distinct, self.sample)
        if least < 1 or self.side < 64 or self.megabytes < 0:
            raise ValueError(
                f"submission.tiles is {self.tiles}, distinct {self.distinct}, sample {self.sample}, side {self.side}, "
                f"megabytes {self.megabytes}; wanted at least 1 of each, 64 px, and no negative size"
            )
