"""Paths of a camera: read from a file of poses, or named motions; no torch."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, read_text_file

CameraPath = tuple[tuple[float, ...], ...]
"""For each frame fx, fy, cx, cy in pixels, then the camera-to-world matrix (3, 4) relative to the first."""

_POSE_ASPECT = 16 / 9
"""Of the pictures whose focal lengths a file has; those of RealEstate10K's are 1280x720."""
_MOTION_LENS = (0.532139961, 0.946026558, 0.5, 0.5)
"""fx, fy, cx, cy of named motions, in widths and heights."""
_STEP = 1 / 54
"""How far the camera moves in a frame."""
_TURN = math.pi / 243
"""How far it rolls in a frame, in radians."""
_VALUES_PER_POSE = 19
_MAX_FILE_BYTES = 2**26


class _Motion(NamedTuple):
    """Translation and roll of the world before the camera, a frame."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    roll: float = 0.0


MOTIONS = {
    "static": _Motion(),
    "pan_left": _Motion(x=_STEP),
    "pan_right": _Motion(x=-_STEP),
    "pan_up": _Motion(y=_STEP),
    "pan_down": _Motion(y=-_STEP),
    "pan_left_up": _Motion(x=_STEP, y=_STEP),
    "pan_left_down": _Motion(x=_STEP, y=-_STEP),
    "pan_right_up": _Motion(x=-_STEP, y=_STEP),
    "pan_right_down": _Motion(x=-_STEP, y=-_STEP),
    "zoom_in": _Motion(z=-2 * _STEP),
    "zoom_out": _Motion(z=2 * _STEP),
    "anticlockwise": _Motion(roll=_TURN),
    "clockwise": _Motion(roll=-_TURN),
}
"""Motions as in VideoX-Fun's files of poses, whose ACW and CW are anticlockwise and clockwise."""


def read_camera(value: str, frame_num: int, size: tuple[int, int]) -> CameraPath:
    """Return the camera of each frame, of a named motion or of a file of poses; ``size``: (width, height).

    A file is as RealEstate10K's: a first line of any text, then for each frame 19 numbers: time, fx, fy, cx,
    cy in widths and heights, two zeros, and the world-to-camera matrix (3, 4) row by row. Raises InputError
    for one that cannot be read, and for fewer poses than frames.
    """
    if value in MOTIONS:
        lenses = np.tile(_MOTION_LENS, (frame_num, 1))
        matrices = np.stack([_make_pose(MOTIONS[value], index) for index in range(frame_num)])
    else:
        poses = np.array(list(_read_poses(value)))
        if len(poses) < frame_num:
            raise InputError(
                f"camera={value} has {len(poses)} poses, and frame_num={frame_num} needs as many; "
                f"use at most frame_num={(len(poses) - 1) // 4 * 4 + 1}, or a longer path"
            )
        lenses, matrices = poses[:frame_num, 1:5], poses[:frame_num, 7:].reshape(-1, 3, 4)
    return _place_cameras(lenses, matrices, size)


def _place_cameras(lenses: np.ndarray, matrices: np.ndarray, size: tuple[int, int]) -> CameraPath:
    """Return lenses (F, 4) in pixels of a video of ``size``, and poses (F, 3, 4) relative to the first."""
    width, height = size
    lenses = lenses.copy()
    if width / height < _POSE_ASPECT:
        lenses[:, 0] *= _POSE_ASPECT * height / width
    else:
        lenses[:, 1] *= width / height / _POSE_ASPECT
    world_to_camera = np.zeros((len(matrices), 4, 4))
    world_to_camera[:, :3], world_to_camera[:, 3, 3] = matrices, 1
    camera_to_world = world_to_camera[0] @ np.linalg.inv(world_to_camera)
    camera_to_world[0] = np.eye(4)
    rows = np.concatenate(
        [lenses * [width, height, width, height], camera_to_world[:, :3].reshape(-1, 12)], axis=1
    )
    return tuple(tuple(row) for row in rows.tolist())


def _make_pose(motion: _Motion, index: int) -> np.ndarray:
    """Return the world-to-camera matrix (3, 4) of a frame."""
    cos, sin = math.cos(index * motion.roll), math.sin(index * motion.roll)
    x, y, z = index * motion.x, index * motion.y, index * motion.z
    return np.array([[cos, -sin, 0, x], [sin, cos, 0, y], [0, 0, 1, z]])


def _read_poses(file: str) -> Iterator[list[float]]:
    """Yield the numbers of each pose in a file; raises InputError."""
    try:
        text = read_text_file(Path(file).expanduser(), max_bytes=_MAX_FILE_BYTES)
    except (UnreadableFileError, RuntimeError) as error:
        raise InputError(
            f"camera={file} is neither a motion ({', '.join(MOTIONS)}) nor a file of poses ({error})"
        ) from None
    for number, line in enumerate(text.splitlines()[1:], start=2):
        if not line.strip():
            continue
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            values = []
        if len(values) != _VALUES_PER_POSE or not all(map(math.isfinite, values)):
            raise InputError(
                f"camera={file}, line {number}: a pose is {_VALUES_PER_POSE} numbers: time, fx, fy, cx, "
                "cy, 0, 0, and the world-to-camera matrix (3, 4)"
            )
        matrix = np.array(values[7:]).reshape(3, 4)
        if values[1] <= 0 or values[2] <= 0 or abs(np.linalg.det(matrix[:, :3])) < 1e-6:
            raise InputError(
                f"camera={file}, line {number}: the focal lengths must be above 0, and the matrix a rotation"
            )
        yield values
