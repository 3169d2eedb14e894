"""What a malformed input is: files made in a folder, what is asked of the program, and what it must
answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_dist.models.dims import ModelDims, TextEncoderDims, TransformerDims, VaeDims

SETTINGS = [
    "task=toy",
    "size=32*16",
    "frame_num=1",
    "sample.steps=1",
    "device=cpu",
    "dtype=float32",
    "negative_prompt=blurry",
]
"""Of every run, so that nothing depends on the defaults of a task."""
RUN = [*SETTINGS, "prompt=a cat"]

WHOLE = "../whole"
"""A checkpoint that is whole, from the folder that a case is in."""
DIMS = ModelDims(
    transformer=TransformerDims(num_layers=2, dim=48, ffn_dim=64, num_heads=4, text_dim=32),
    text_encoder=TextEncoderDims(
        num_layers=2, dim=32, ffn_dim=64, num_heads=4, head_dim=8, vocab_size=259
    ),
    vae=VaeDims(dim=4, decoder_dim=4),
)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    make: Callable[[Path], Sequence[str]]
    """Makes the files in an empty folder; returns arguments."""
    says: tuple[str, ...] = ()
    """What the error must contain; nothing: there is none."""
    check: Callable[[Any, Path], None] | None = None
    """Looks at a correct result: the record of a run, or what ``read`` returned, and the folder of
    results.
    """
    read: Callable[[Sequence[str]], Any] | None = None
    """What is done with the arguments; None: the command runs with them, where they do not name one
    with a checkpoint that is whole.
    """


def setting(*arguments: str, says: str | tuple[str, ...], name: str = "") -> Case:
    """Return the case of settings that must be refused."""
    shown = name or " ".join(arguments)
    return Case(
        shown if len(shown) < 60 else f"{shown[:57]}...",
        lambda _: [*RUN, *arguments],
        says if isinstance(says, tuple) else (says,),
    )


def accepted(*arguments: str, name: str = "", check: Callable[[Any, Path], None]) -> Case:
    """Return the case of settings that look odd and must work."""
    return Case(name or " ".join(arguments), lambda _: [*RUN, *arguments], check=check)
