"""The toy model shows what it is asked for, on one rank and on two: told from the pixels, for
captions that it was not trained on.
"""

import os
from collections.abc import Sequence

from bench.toy_quality import videos_of
from tests.forked import run_ranks
from toy.held_out import draw_held_out
from toy.judge import judge, psnr

ASKED = draw_held_out(64)[: int(os.environ.get("WAN_DIST_CAPTIONS", "2"))]


def run_forked(num_ranks: int, settings: Sequence[str], _: int) -> None:
    run_ranks(num_ranks, "wan_dist.run", *settings)


def test_nine_of_ten_captions_are_shown_rightly() -> None:
    made = {
        num_ranks: videos_of(ASKED, ["device=cpu"], num_ranks=num_ranks, run=run_forked)
        for num_ranks in (1, 2)
    }
    for num_ranks, videos in made.items():
        verdicts = {
            text: judge(video.frames, scene)
            for (scene, text), video in zip(ASKED, videos, strict=True)
        }
        wrong = {text: verdict.seen for text, verdict in verdicts.items() if not verdict.right}
        assert len(wrong) <= 0.1 * len(ASKED), (num_ranks, wrong)
    assert (
        min(psnr(one.frames, other.frames) for one, other in zip(*made.values(), strict=True)) > 50
    )
