"""Parallel degrees: the number of ranks on each mesh axis, planned or checked if requested; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_dist.config.choices import EIGHT_BIT_BACKENDS
from wan_dist.config.sections import ParallelConfig
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import read_checkpoint_json
from wan_dist.tasks.base import Task

MIN_STRIP_PIXELS = 2
"""Least latent pixels of a rank's strip of a video that is split: the widest halo that a neighbour needs."""
_TRANSFORMER_FOLDERS = (".", "high_noise_model", "transformer", "diffusion_models", "unet")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the mesh's axes, outermost first; ulysses is innermost, so that its ranks share a node."""

    dp: int = 1
    """Data-parallel replicas, each for videos of its own."""
    cfg: int = 1
    """2: each of the two branches of classifier-free guidance on its own ranks; else 1."""
    ring: int = 1
    """Sequence parts of ring attention: each keeps its queries, and keys and values pass around the ring."""
    ulysses: int = 1
    """Sequence parts of Ulysses: all-to-all from tokens to heads before attention, and back after it."""

    @property
    def num_ranks(self) -> int:
        """Product of all degrees."""
        return self.dp * self.cfg * self.ring * self.ulysses

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that work on one video."""
        return self.cfg * self.ring * self.ulysses

    @property
    def advice(self) -> str:
        """How to request these degrees, as an error suggests it."""
        settings = [
            f"parallel.{name}={degree}" for name, degree in vars(self).items() if degree > 1
        ]
        return f"use {' '.join(settings)}" if settings else "leave parallel.* unset"

    def __str__(self) -> str:
        return f"dp {self.dp} x cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


def plan_degrees(
    num_ranks: int,
    *,
    ranks_per_node: int,
    num_heads: int,
    is_guided: bool,
    dp: int | None = None,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
) -> Degrees:
    """Return degrees whose product is ``num_ranks``: requested ones as they are, others by rule.

    The rule: the two branches of guidance first, then Ulysses inside a node, then a ring for what is left;
    any number of ranks works for any number of heads. Raises InputError, with the arithmetic and what would
    fit, if the requested degrees cannot be met.
    """
    requested = {"dp": dp, "cfg": cfg, "ring": ring, "ulysses": ulysses}
    requested_settings = " x ".join(
        f"parallel.{name}={value}" for name, value in requested.items() if value is not None
    )
    for name, value in requested.items():
        if value is not None and value < 1:
            raise InputError(f"parallel.{name}={value} must be at least 1")
    default_degrees = _find_degrees(num_ranks, ranks_per_node, num_heads, is_guided, {"dp": 1})
    assert default_degrees is not None
    suggestion = default_degrees.advice
    if cfg is not None and cfg > 2:
        raise InputError(f"parallel.cfg={cfg} must be 1 or 2: guidance has two passes")
    if cfg == 2 and not is_guided:
        raise InputError(
            "parallel.cfg=2 needs guidance, but sample.guide_scale=1 turns it off; use parallel.cfg=1"
        )
    if ulysses is not None and num_heads % ulysses:
        legal_degrees = ", ".join(
            str(degree) for degree in range(1, num_heads + 1) if num_heads % degree == 0
        )
        raise InputError(
            f"parallel.ulysses={ulysses} does not divide the {num_heads} heads "
            f"(it may be {legal_degrees}); on {num_ranks} rank{'s' if num_ranks > 1 else ''} {suggestion}"
        )
    degrees = _find_degrees(
        num_ranks,
        ranks_per_node,
        num_heads,
        is_guided,
        {key: value for key, value in requested.items() if value is not None},
    )
    if degrees is None:
        raise InputError(
            f"{requested_settings} does not fit {num_ranks} rank{'s' if num_ranks > 1 else ''}: "
            f"the product must divide their number; {suggestion}"
        )
    return degrees


def choose_degrees(
    parallel: ParallelConfig,
    ranks: tuple[int, int],
    num_heads: int,
    *,
    is_guided: bool,
    is_job: bool,
) -> Degrees:
    """Return the degrees of all axes; raises InputError for those that do not fit the ranks or the run."""
    num_ranks, ranks_per_node = ranks
    degrees = plan_degrees(
        num_ranks,
        ranks_per_node=ranks_per_node,
        num_heads=num_heads,
        is_guided=is_guided,
        dp=parallel.dp,
        cfg=parallel.cfg,
        ring=parallel.ring,
        ulysses=parallel.ulysses,
    )
    if degrees.dp > 1 and not is_job:
        raise InputError(
            f"parallel.dp={degrees.dp} needs several videos (jobs=FILE), "
            "and this run generates one; use parallel.dp=1"
        )
    return degrees


def read_num_heads(task: Task, ckpt_dir: str | None, transformer_files: Sequence[Path]) -> int:
    """Return the number of attention heads of the transformer.

    It is read from the config beside the transformer's files, or of the checkpoint, where that can be read,
    else it is that of the task's published model.
    """
    folders = [path.parent for path in transformer_files]
    if ckpt_dir is not None:
        folder = Path(ckpt_dir).expanduser()
        folders += [folder / name for name in _TRANSFORMER_FOLDERS]
    for folder in folders:
        try:
            model_config = read_checkpoint_json(folder / "config.json")
            return int(model_config.get("num_heads") or model_config["num_attention_heads"])
        except (ValueError, KeyError, TypeError):
            continue  # whatever is wrong with the folder is said when it is opened
    return task.transformer_dims.num_heads


def check_attention_split(
    degrees: Degrees, num_tokens: int, attention: str, dtype: str, usp: str
) -> None:
    """Raise InputError if attention with these settings cannot be split by these degrees."""
    if degrees.ring > 1 and attention in EIGHT_BIT_BACKENDS:
        raise InputError(
            f"attention={attention} returns no log-sum-exp, which parallel.ring "
            "needs to merge partial results; use parallel.ring=1, or another attention"
        )
    if usp != "xfuser":
        return
    if dtype == "float32":
        raise InputError(
            "parallel.usp=xfuser uses FlashAttention, which does not support dtype=float32; "
            "use parallel.usp=plain"
        )
    if num_tokens % (num_sequence_parts := degrees.ring * degrees.ulysses):
        raise InputError(
            f"parallel.usp=xfuser cannot split {num_tokens} tokens evenly over {num_sequence_parts} ranks "
            "and would attend to padding; use parallel.usp=plain"
        )


def _find_degrees(
    num_ranks: int, ranks_per_node: int, num_heads: int, is_guided: bool, requested: dict[str, int]
) -> Degrees | None:
    """Return the preferred degrees among those with the ``requested`` ones; None if none fit."""
    cfg_candidates: tuple[int, ...] = (2, 1) if is_guided else (1,)
    if "cfg" in requested:
        cfg_candidates = (requested["cfg"],)
    for cfg in cfg_candidates:
        num_fixed_ranks = cfg * requested.get("dp", 1) * requested.get("ring", 1)
        if num_ranks % num_fixed_ranks:
            continue
        num_remaining_ranks = num_ranks // num_fixed_ranks
        if "ulysses" in requested:
            ulysses = requested["ulysses"]
        else:
            divisors = [
                degree
                for degree in range(num_remaining_ranks, 0, -1)
                if num_remaining_ranks % degree == 0 and num_heads % degree == 0
            ]
            ulysses = next(
                degree
                for degree in divisors
                if degree <= ranks_per_node and ranks_per_node % degree == 0
            )
        if num_remaining_ranks % ulysses:
            continue
        num_remaining_ranks //= ulysses
        if "ring" not in requested:
            ring, num_remaining_ranks = num_remaining_ranks, 1
        else:
            ring = requested["ring"]
        dp = requested.get("dp", 1)
        if "dp" not in requested:
            dp, num_remaining_ranks = num_remaining_ranks, 1
        if num_remaining_ranks == 1:
            return Degrees(dp=dp, cfg=cfg, ring=ring, ulysses=ulysses)
    return None
