"""The toy model shows what it is asked for, on one rank and on two: told from the pixels, for captions that it was not trained on."""

import os
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from toy.judge import judge
from toy.score import held_out, psnr, videos_of

ASKED = held_out(64)[: int(os.environ.get("WAN_DIST_CAPTIONS", "4"))]


@cache
def made(num_ranks: int) -> list[NDArray[np.uint8]]:
    return videos_of(ASKED, ["device=cpu"], num_ranks=num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nine_of_ten_captions_are_shown_rightly(num_ranks: int) -> None:
    wrong = {
        text: verdict.seen
        for (scene, text), frames in zip(ASKED, made(num_ranks), strict=True)
        if not (verdict := judge(frames, scene)).right
    }
    assert len(wrong) <= 0.1 * len(ASKED), wrong


def test_two_ranks_show_what_one_shows() -> None:
    assert min(psnr(one, other) for one, other in zip(made(1), made(2), strict=True)) > 50
