"""What a video shows, told from its pixels alone: background, colours, and how each thing moves."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toy.scenes import COLORS, Scene

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_LEAST = 0.004
"""Of the frame, that a thing must cover."""
_LARGEST = 0.25
"""How far a thing's pixels may be from its middle."""


@dataclass(frozen=True)
class Verdict:
    """What of a scene a video shows rightly."""

    background: bool
    colors: bool
    motions: bool
    seen: str
    """What it was taken for."""

    @property
    def right(self) -> bool:
        """Whether all is."""
        return self.background and self.colors and self.motions


def judge(frames: NDArray[np.uint8], scene: Scene) -> Verdict:
    """Compare a video (F, H, W, 3) with the scene that was asked for."""
    names = list(COLORS)
    nearest = (np.square(_PALETTE).sum(-1) - 2 * (frames.astype(np.float32) @ _PALETTE.T)).argmin(
        -1
    )  # (F, H, W)
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


def motion_of(mask: NDArray[np.bool_]) -> str:
    """Return how what the mask (F, H, W) shows moves: one of `toy.scenes.MOTIONS`, still, or nothing."""
    areas = mask.sum((1, 2)).astype(float)
    if (areas < _LEAST / 2 * mask[0].size).sum() > 2:
        return "nothing"
    places = np.array(
        [_center(frame) for frame, area in zip(mask, areas, strict=True) if area]
    )  # (F, 2): x, y
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
    """Return x and y (down) of what covers the frame, which is 1 wide; a few pixels elsewhere, such as edges of others, do not count."""
    rows, columns = (places / frame.shape[1] for places in np.nonzero(frame))
    near = np.hypot(rows - np.median(rows), columns - np.median(columns)) < _LARGEST
    return float(columns[near].mean()), float(rows[near].mean())


def _turns(mask: NDArray[np.bool_]) -> bool:
    """Whether the outline changes, though what it is of stays where it is."""
    changes = [
        np.logical_xor(one, other).sum() / one.sum()
        for one, other in zip(mask, mask[3:], strict=False)
        if one.sum()
    ]
    return float(np.mean(changes)) > 0.07
