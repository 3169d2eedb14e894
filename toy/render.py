"""Rendering of scenes as videos, on the fly, on any device."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from toy.scenes import COLORS, SHAPES, Scene, Thing

SIZE, NUM_FRAMES = 128, 33
_CORNERS = {"circle": 3, "square": 4, "triangle": 3, "star": 5}
_INNER = {"circle": 1.0, "square": math.cos(math.pi / 4), "triangle": 0.5, "star": 0.45}
"""Radius of the points midway between corners, relative to that of the corners."""
_REACH = {"circle": 1.0, "square": 1.2, "triangle": 1.35, "star": 1.35}
"""Radius of the corners at which the shapes look equally large, relative to that of the circle."""


def render(
    scenes: Sequence[Scene],
    chance: random.Random,
    device: torch.device,
    *,
    size: int = SIZE,
    num_frames: int = NUM_FRAMES,
) -> Tensor:
    """Return a video of each scene: (B, 3, F, H, W), float32 in [-1, 1]; positions and speeds are random."""
    axis = (torch.arange(size, device=device) + 0.5) / size
    video = torch.stack([_color(scene.background, device) for scene in scenes])[
        :, :, None, None, None
    ].expand(-1, 3, num_frames, size, size)
    for number in range(max(len(scene.things) for scene in scenes)):
        shown = [scene.things[number] if number < len(scene.things) else None for scene in scenes]
        path = torch.tensor(
            [_path(scene, number, chance, num_frames) for scene in scenes], device=device
        )  # (B, F, 4)
        cover = _cover(shown, path, axis, size)[:, None]  # (B, 1, F, H, W)
        color = torch.stack(
            [
                _color(thing.color if thing else scene.background, device)
                for thing, scene in zip(shown, scenes, strict=True)
            ]
        )
        video = video + cover * (color[:, :, None, None, None] - video)
    return video


def _color(name: str, device: torch.device) -> Tensor:
    return torch.tensor(COLORS[name], device=device) / 127.5 - 1


def _path(
    scene: Scene, number: int, chance: random.Random, num_frames: int
) -> list[tuple[float, float, float, float]]:
    """Return x, y (from the top), radius and angle of a thing in each frame; the frame is 1 wide."""
    if number >= len(scene.things):
        return [(-1.0, -1.0, 0.01, 0.0)] * num_frames  # outside
    thing, is_alone = scene.things[number], len(scene.things) == 1
    radius = chance.uniform(0.15, 0.18) if is_alone else chance.uniform(0.1, 0.115)
    beside = _is_beside(scene)
    if is_alone:
        half_x, half_y = 0.48, 0.48
    else:
        half_x, half_y = (0.24, 0.48) if beside else (0.48, 0.24)
    center_x = 0.5 if is_alone or not beside else 0.26 + 0.48 * number
    center_y = 0.5 if is_alone or beside else 0.26 + 0.48 * number
    room_x, room_y = half_x - 1.35 * radius, half_y - 1.35 * radius
    along_x, along_y = 0.0, 0.0
    if thing.motion in ("right", "left", "circling"):
        along_x = chance.uniform(0.75, 1) * min(room_x, 0.33)
    if thing.motion in ("up", "down", "bouncing"):
        along_y = chance.uniform(0.75, 1) * min(room_y, 0.33)
    if thing.motion == "circling":
        along_x = along_y = min(along_x, chance.uniform(0.75, 1) * min(room_x, room_y, 0.27))
    if thing.motion == "growing":
        room_x, room_y = room_x - 0.8 * radius, room_y - 0.8 * radius
    x = center_x + chance.uniform(-1, 1) * max(0.0, room_x - along_x) * 0.7
    y = center_y + chance.uniform(-1, 1) * max(0.0, room_y - along_y) * 0.7
    turn = chance.uniform(0, 2 * math.pi)
    return [
        _at(thing, frame / (num_frames - 1), x, y, along_x, along_y, radius, turn)
        for frame in range(num_frames)
    ]


def _is_beside(scene: Scene) -> bool:
    """Whether two things are side by side, not one above the other: if one of them moves vertically."""
    return any(thing.motion in ("up", "down", "bouncing") for thing in scene.things)


def _at(
    thing: Thing,
    t: float,
    x: float,
    y: float,
    along_x: float,
    along_y: float,
    radius: float,
    turn: float,
) -> tuple[float, float, float, float]:
    """Return x, y, radius and angle at time ``t`` in [0, 1]; ``along_x`` and ``along_y`` are amplitudes."""
    angle = -math.pi / 2 if thing.shape in ("triangle", "star") else math.pi / 4
    match thing.motion:
        case "right" | "left":
            x += along_x * (2 * t - 1) * (1 if thing.motion == "right" else -1)
        case "down" | "up":
            y += along_y * (2 * t - 1) * (1 if thing.motion == "down" else -1)
        case "circling":
            x += along_x * math.cos(turn + 2 * math.pi * t)
            y += along_y * math.sin(turn + 2 * math.pi * t)
        case "bouncing":
            y += along_y * (1 - 2 * abs(math.sin(2 * math.pi * t)))
        case "growing":
            radius *= 0.5 + 1.3 * t
        case "spinning":
            angle += 2 * math.pi * t
    return x, y, radius * _REACH[thing.shape], angle


def _cover(shown: Sequence[Thing | None], path: Tensor, axis: Tensor, size: int) -> Tensor:
    """Return the fraction of each pixel that the things cover, (B, F, H, W), for paths (B, F, 4)."""
    x, y, radius, angle = (part[:, :, None, None] for part in path.unbind(-1))
    names = [thing.shape if thing else "circle" for thing in shown]
    corners, inner = (
        torch.tensor([float(table[name]) for name in names], device=axis.device)[
            :, None, None, None
        ]
        for table in (_CORNERS, _INNER)
    )
    right, down = axis[None, None, None, :] - x, axis[None, None, :, None] - y
    distance = torch.hypot(right, down)
    wedge = math.pi / corners  # from a corner to the middle between it and the next one
    folded = (torch.remainder(torch.atan2(down, right) - angle + wedge, 2 * wedge) - wedge).abs()
    px, py = distance * folded.cos(), distance * folded.sin()
    side_x, side_y = inner * radius * wedge.cos() - radius, inner * radius * wedge.sin()
    to_side = ((px - radius) * side_y - py * side_x) / torch.hypot(
        side_x, side_y
    )  # above 0: outside
    is_circle = torch.tensor([name == "circle" for name in names], device=axis.device)[
        :, None, None, None
    ]
    outside = torch.where(is_circle, distance - radius, to_side)
    return (0.5 - outside * size).clamp(0, 1)


assert set(_CORNERS) == set(SHAPES)
