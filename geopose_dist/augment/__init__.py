"""Augmentation with right labels: `draw` takes the random numbers, `apply` does what they say.

Heights can be raised, tiles turned, mirrored, zoomed and cropped in one resampling, and colours changed;
direction, scale and GSD follow by `geometry.Pose`. See recipe.py for what may be drawn.
"""

from geopose_dist.augment.apply import Augmenter, apply, raise_heights
from geopose_dist.augment.deferred import Deferrer, defer, transform_of
from geopose_dist.augment.draw import Draw, Tone, draw
from geopose_dist.augment.recipe import AugmentRecipe
from geopose_dist.augment.window import needed_window

__all__ = [
    "AugmentRecipe",
    "Augmenter",
    "Deferrer",
    "Draw",
    "Tone",
    "apply",
    "defer",
    "draw",
    "needed_window",
    "raise_heights",
    "transform_of",
]
