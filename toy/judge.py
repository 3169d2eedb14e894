"""Evaluation of a toy video from its pixels: background, colours, and the motion of each shape."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toy.scenes import COLORS, Scene

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_LEAST = 0.004
"""Least fraction of the frame that a shape covers."""
_LARGEST = 0.25
"""Largest distance of a shape's pixels from its centre; the frame is 1 wide."""


@dataclass(frozen=True)
class Verdict:
    """Which parts of a scene a video shows correctly."""

    background: bool
    colors: bool
    motions: bool
    seen: str
    """Description of the scene that was recognized."""

    @property
    def right(self) -> bool:
        """Whether all parts are correct."""
        return self.background and self.colors and self.motions


def judge(frames: NDArray[np.uint8], scene: Scene) -> Verdict:
    """Compare a video (F, H, W, 3), uint8, with the requested scene."""
    names = list(COLORS)
    # Squared distances to the palette's colours, less the pixel's own square.
    distances = np.square(_PALETTE).sum(-1) - 2 * (frames.astype(np.float32) @ _PALETTE.T)
    nearest = distances.argmin(-1)  # (F, H, W)
    shares = np.bincount(nearest.flatten(), minlength=len(names)) / nearest.size
    background = int(shares.argmax())
    shares[background] = 0
    order = [int(index) for index in np.argsort(-shares) if shares[index] > _LEAST][
        : len(scene.things)
    ]
    seen = [names[index] for index in order]
    wanted = {thing.color: thing.motion for thing in scene.things}
    moves = {name: motion_of(nearest == names.index(name)) for name in seen}
    return Verdict(
        background=names[background] == scene.background,
        colors=set(seen) == set(wanted),
        motions=set(seen) == set(wanted)
        and all(moves[name] == motion for name, motion in wanted.items()),
        seen=f"{', '.join(f'{name} {moves[name]}' for name in seen)} on {names[background]}",
    )


def psnr(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 78."""
    error = np.square(video.astype(np.float64) - reference).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def motion_of(mask: NDArray[np.bool_]) -> str:
    """Return how the shape in a mask (F, H, W) moves.

    One of `toy.scenes.MOTIONS`, or still, nothing, something else.
    """
    areas = mask.sum((1, 2)).astype(float)
    if (areas < _LEAST / 2 * mask[0].size).sum() > 2:
        return "nothing"
    # (F, 2): x, y
    places = np.array([_center(frame) for frame, area in zip(mask, areas, strict=True) if area])
    span = places.max(0) - places.min(0)
    way = places[-1] - places[0]
    far = max(span)
    steps = np.linalg.norm(np.diff(places[::2], axis=0), axis=1).sum()
    if areas[-4:].mean() > 2.2 * areas[:4].mean() and far < 0.12:
        return "growing"
    if far < 0.045:
        return "spinning" if _turns(mask) else "still"
    if np.linalg.norm(way) > 0.75 * far and steps < 1.4 * np.linalg.norm(way):
        if abs(way[0]) > 2 * abs(way[1]):
            return "right" if way[0] > 0 else "left"
        if abs(way[1]) > 2 * abs(way[0]):
            return "down" if way[1] > 0 else "up"
    if min(span) > 0.5 * far and steps > 2 * far:
        return "circling"
    if span[1] > 3 * span[0] and steps > 2.5 * span[1]:
        return "bouncing"
    return "still" if far < 0.08 else "something else"


def _center(frame: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the centre of a shape in a frame (H, W): x, and y from the top; the frame is 1 wide.

    A few pixels elsewhere, such as the edges of another shape, are ignored.
    """
    rows, columns = (places / frame.shape[1] for places in np.nonzero(frame))
    near = np.hypot(rows - np.median(rows), columns - np.median(columns)) < _LARGEST
    return float(columns[near].mean()), float(rows[near].mean())


def _turns(mask: NDArray[np.bool_]) -> bool:
    """Whether the outline of a shape that stays in place changes, by comparison with three frames later."""
    changes = [
        np.logical_xor(one, other).sum() / one.sum()
        for one, other in zip(mask, mask[3:], strict=False)
        if one.sum()
    ]
    return float(np.mean(changes)) > 0.07
