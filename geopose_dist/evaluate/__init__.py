"""The score of predictions, their form, and the files of the challenge."""

from geopose_dist.evaluate.evaluate import score

__all__ = ["score"]
