"""What `geopose split --by similarity` may be told; no OpenCV here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SimilarityRecipe:
    """How `split --by similarity` compares tiles."""

    candidates: int = 48
    """Tiles of the same city that a tile is compared with, those that resemble it most; more finds more, in
    proportionate time. With so many tiles in a city or fewer, all pairs are compared."""
    keypoints: int = 1024
    """Most features of a tile."""
    matches: int = 0
    """Matches that make a pair; 0: just above what mirrored tiles of the dataset reach by chance."""
    workers: int = 0
    """Processes; 0 is one per core."""

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.keypoints < 64 or self.matches < 0 or self.workers < 0:
            raise ValueError(
                f"similarity.candidates is {self.candidates}, keypoints {self.keypoints}, matches {self.matches}, "
                f"workers {self.workers}; wanted at least 1, 64, 0 and 0"
            )
