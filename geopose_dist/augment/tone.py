"""Changes of colour that leave geometry and labels alone: a table per channel, then noise.

Gamma, contrast, brightness, channel factors and haze act on each value alone, so together they are one table
of 256 entries per channel. Noise adds a normal deviate of the wanted deviation, rounded to grey levels and
looked up by a random byte, which is some thirty times cheaper than drawing normals.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from geopose_dist import kernels
from geopose_dist.augment.draw import Tone
from geopose_dist.data.sample import U8

HAZE_COLOUR = (0.74, 0.78, 0.84)
"""Airlight that haze blends in, red, green, blue of 1: a little blue, as scattering is."""

_NORMAL = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)])


def table(tone: Tone) -> U8:
    """uint8 [3, 256]: what each value of each channel becomes, noise apart."""
    value = (np.arange(256) / 255) ** tone.gamma
    value = (value - 0.5) * tone.contrast + 0.5 + tone.brightness
    channels = value[None, :] * np.array(tone.colour)[:, None]
    channels = channels * (1 - tone.haze) + tone.haze * np.array(HAZE_COLOUR)[:, None]
    rounded: U8 = np.rint(np.clip(channels, 0, 1) * 255).astype(np.uint8)
    return rounded


def noise_of(tone: Tone) -> npt.NDArray[np.int8]:
    """int8 [256]: what each random byte adds to a value; all 0 without noise."""
    rounded: npt.NDArray[np.int8] = np.rint(_NORMAL * tone.noise).clip(-127, 127).astype(np.int8)
    return rounded


def apply_tone(rgb: U8, tone: Tone) -> U8:
    """The image uint8 [H, W, 3] with its colours changed; a pure function of image and tone."""
    noise = noise_of(tone)
    if not noise.any():
        return kernels.tone(rgb, table(tone))
    random = np.frombuffer(
        np.random.Generator(np.random.Philox(key=tone.noise_seed)).bytes(rgb.size), np.uint8
    )
    return kernels.tone(rgb, table(tone), noise, random)
