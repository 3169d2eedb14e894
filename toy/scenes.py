"""Scenes of the toy model: coloured shapes that move on a background, with English and Chinese captions."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

COLORS = {
    "red": (225, 35, 35),
    "green": (35, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 220, 40),
    "orange": (250, 135, 20),
    "purple": (145, 50, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""RGB colours, 0 to 255, of shapes and of backgrounds."""
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("right", "left", "up", "down", "circling", "bouncing", "growing", "spinning")

_ENGLISH_SHAPES = {
    "circle": ("circle", "circle", "ball", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_ENGLISH_MOTIONS = {
    "right": ("moving right", "moving to the right", "going right", "sliding to the right"),
    "left": ("moving left", "moving to the left", "going left", "sliding to the left"),
    "up": ("moving up", "moving upwards", "going up", "rising"),
    "down": ("moving down", "moving downwards", "going down", "sinking"),
    "circling": ("moving in a circle", "going round in a circle", "circling"),
    "bouncing": ("bouncing", "bouncing up and down", "hopping up and down"),
    "growing": ("growing", "growing bigger", "getting bigger"),
    "spinning": ("spinning", "spinning around", "rotating", "turning on the spot"),
}
_ENGLISH = (
    "{things} on {ground} background",
    "{things}, {background} background",
    "on {ground} background, {things}",
    "{ground} background with {things}",
    "{things} in front of {ground} background",
)
_CHINESE_COLORS = dict(
    zip(COLORS, ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "白色", "黑色"), strict=True)
)
_CHINESE_SHAPES = {
    "circle": ("圆形", "圆球"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星形", "星星"),
}
_CHINESE_MOTIONS = {
    "right": ("向右移动", "往右移动"),
    "left": ("向左移动", "往左移动"),
    "up": ("向上移动", "上升"),
    "down": ("向下移动", "下降"),
    "circling": ("绕圈移动", "绕着圆圈移动"),
    "bouncing": ("弹跳", "上下弹跳"),
    "growing": ("变大", "逐渐变大"),
    "spinning": ("旋转", "原地旋转"),
}


@dataclass(frozen=True)
class Thing:
    """A shape that moves."""

    color: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """One or two things on a background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def is_held_out(self) -> bool:
        """Whether it is held out of training: one in eleven combinations of a thing and a background."""
        return any(_is_held_out(thing, self.background) for thing in self.things)


def _is_held_out(thing: Thing, background: str) -> bool:
    color, ground = (list(COLORS).index(name) for name in (thing.color, background))
    return (
        31 * color + 17 * SHAPES.index(thing.shape) + 7 * MOTIONS.index(thing.motion) + 3 * ground
    ) % 11 == 0


def all_scenes() -> Iterator[Scene]:
    """Yield every scene of one thing; none has a spinning circle, whose motion is invisible."""
    for background in COLORS:
        for color in COLORS:
            for shape in SHAPES:
                for motion in MOTIONS:
                    if color != background and (shape, motion) != ("circle", "spinning"):
                        yield Scene((Thing(color, shape, motion),), background)


def draw_scene(chance: random.Random) -> Scene:
    """Return a random scene for training; three in ten have two things, of different colours."""
    while True:
        background, *colors = chance.sample(list(COLORS), 3)
        things = tuple(
            Thing(color, chance.choice(SHAPES), chance.choice(MOTIONS))
            for color in colors[: 2 if chance.random() < 0.3 else 1]
        )
        scene = Scene(things, background)
        if not scene.is_held_out and all(
            (thing.shape, thing.motion) != ("circle", "spinning") for thing in things
        ):
            return scene


def caption(scene: Scene, chance: random.Random) -> str:
    """Return a random caption of a scene; a third of them are Chinese."""
    if chance.random() < 1 / 3:
        return _chinese(scene, chance)
    things = []
    for thing in scene.things:
        shape, motion = (
            chance.choice(table[name])
            for table, name in ((_ENGLISH_SHAPES, thing.shape), (_ENGLISH_MOTIONS, thing.motion))
        )
        things.append(
            f"{_article(thing.color)} {thing.color} {shape} {chance.choice(('', '', 'is '))}{motion}"
        )
    ground = f"{_article(scene.background)} {scene.background}"
    text = chance.choice(_ENGLISH).format(
        things=" and ".join(things), ground=ground, background=scene.background
    )
    return text[0].upper() + text[1:] if chance.random() < 0.2 else text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _chinese(scene: Scene, chance: random.Random) -> str:
    background = f"{_CHINESE_COLORS[scene.background]}背景"
    named = [
        (
            f"一个{_CHINESE_COLORS[each.color]}{chance.choice(_CHINESE_SHAPES[each.shape])}",
            chance.choice(_CHINESE_MOTIONS[each.motion]),
        )
        for each in scene.things
    ]
    things = "，".join(name + motion for name, motion in named)
    if len(named) == 1 and chance.random() < 0.4:
        return f"{named[0][0]}在{background}上{named[0][1]}"
    return f"{background}上，{things}" if chance.random() < 0.7 else f"{things}，{background}"
