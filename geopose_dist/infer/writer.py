"""Poses as files, whole or not at all, and the look that tells a finished tile from anything else.

Challenge files hold uint16 centimetres (never 65535) and px/cm; on request metres in float32 and px/m. The
pose is written before the heights, so a tile whose heights are there is complete; a resumed job looks at
both files without decoding them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from geopose_dist import geometry
from geopose_dist.errors import UserError
from geopose_dist.evaluate import predictions
from geopose_dist.files import write_bytes
from geopose_dist.geometry import F32
from geopose_dist.infer.predictor import TilePose


def paths_of(folder: Path, key: str) -> tuple[Path, Path]:
    """The heights and the pose file of a tile."""
    return folder / f"{key}_AGL.tif", folder / f"{key}_VFLOW.json"


def write_pose(folder: Path, key: str, pose: TilePose, unit: str) -> None:
    """Write both files of a tile in `unit` cm or m."""
    agl, vflow = paths_of(folder, key)
    if unit == "m":
        facts = json.loads(predictions.encode_vflow(pose.scale_px_per_m, pose.angle_rad))
        facts["scale"] = predictions.rounded(pose.scale_px_per_m)
        write_bytes(vflow, (json.dumps(facts) + "\n").encode())
        write_bytes(agl, _encode_metres(pose.agl_m))
        return
    agl_cm, clipped = predictions.heights_cm(pose.agl_m)
    assert clipped == 0, "the predictor keeps heights inside what a file can hold"
    write_bytes(vflow, predictions.encode_vflow(pose.scale_px_per_m, pose.angle_rad))
    write_bytes(agl, predictions.encode_agl(agl_cm))


def _encode_metres(agl_m: F32) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        agl_m,
        compression="adobe_deflate",
        compressionargs={"level": predictions.DEFLATE_LEVEL},
        predictor=3,  # of floating point
        rowsperstrip=predictions.ROWS_PER_STRIP,
        metadata=None,
        software=False,
        maxworkers=1,
    )
    return buffer.getvalue()


def is_finished(folder: Path, key: str, unit: str) -> bool:
    """Whether both files of a tile are there, readable, and in this unit; heights are not decoded."""
    agl, vflow = paths_of(folder, key)
    if not (agl.is_file() and vflow.is_file()):
        return False
    try:
        scale, angle = predictions.read_vflow(vflow)
        _, dtype = predictions.tiff_shape(agl)
    except UserError:
        return False
    return dtype.kind == ("u" if unit == "cm" else "f") and not geometry.check_label(
        scale, angle, f"px/{unit}", str(vflow)
    )
