"""Segments of the teacher's paths from noise to video, one of the student's steps each, and their pool."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from toy.denoiser import Denoiser


@dataclass(frozen=True)
class Conditions:
    """What videos are of."""

    texts: Tensor
    """Embedded captions (N, n, text_dim)."""
    known: Tensor
    """Latents (N, C, 1, h, w) of first frames."""
    given: Tensor
    """Whether the first frame is given (N); one in four is."""
    no_text: Tensor
    """The embedded empty caption (1, n, text_dim)."""

    def start(self, chosen: Tensor, noise: Tensor) -> Tensor:
        """Return noise (B, C, T, h, w) with the first frames of the chosen that have one."""
        is_given = self.given[chosen].view(-1, 1, 1, 1, 1)
        first = torch.where(is_given, self.known[chosen], noise[:, :, :1])
        return torch.cat([first, noise[:, :, 1:]], dim=2)


def compute_levels(fraction: Tensor | float, shift: float) -> Tensor:
    """Return the noise levels at fractions of the schedule: 1 at 0, and 0 at 1."""
    u = 1 - torch.as_tensor(fraction, dtype=torch.float32)
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Segments:
    """Parts of paths from noise to video, of one of the student's steps each."""

    starts: Tensor
    """Latents (M, C, T, h, w) where they begin."""
    velocities: Tensor
    """Mean velocities, the same shape; zeros for first frames that are given."""
    steps: Tensor
    """Which of the student's steps each is (M)."""
    chosen: Tensor
    """Which of the conditions it has (M)."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all."""
        return self.starts, self.velocities, self.steps, self.chosen


class Course:
    """The student's noise levels, and the teacher's way between them."""

    def __init__(
        self,
        teacher: Denoiser,
        conditions: Conditions,
        latent_size: tuple[int, ...],
        *,
        num_steps: int,
        num_substeps: int,
        guidance: float,
        shift: float,
    ) -> None:
        self.teacher, self.conditions, self.latent_size = teacher, conditions, latent_size
        self.device = conditions.texts.device
        self.num_steps, self.num_substeps = num_steps, num_substeps
        self.guidance, self.shift = guidance, shift
        self.levels = compute_levels(torch.arange(num_steps + 1) / num_steps, self.shift).to(
            self.device
        )
        self.rotary = teacher.transformer.compute_rotary(
            torch.empty(1, *latent_size, device=self.device)
        )

    def advance(self, latents: Tensor, velocity: Tensor, steps: Tensor) -> Tensor:
        """Return latents after steps of the student (Euler's rule)."""
        return latents + _wide(self.levels[steps + 1] - self.levels[steps]) * velocity

    def predict(self, denoiser: Denoiser, latents: Tensor, steps: Tensor, chosen: Tensor) -> Tensor:
        """Return a student's velocity of latents at its steps (B), of the chosen conditions."""
        conditions = self.conditions
        contexts = denoiser.project(conditions.texts[chosen])
        return denoiser(
            latents, self.levels[steps], conditions.given[chosen], contexts, self.rotary
        )

    def lead(self, latents: Tensor, steps: Tensor, chosen: Tensor) -> Tensor:
        """Return the teacher's mean velocity over the student's steps (B), from their latents."""
        given, texts = self.conditions.given[chosen], self.conditions.texts[chosen]
        contexts = self.teacher.project(
            torch.cat([texts, self.conditions.no_text.expand_as(texts)])
        )
        x = latents
        for substep in range(self.num_substeps):
            level, next_level = (
                compute_levels((steps + part / self.num_substeps) / self.num_steps, self.shift)
                for part in (substep, substep + 1)
            )
            both = self.teacher(
                torch.cat([x, x]), level.repeat(2), given.repeat(2), contexts, self.rotary
            )
            guided, unguided = both.float().chunk(2)
            velocity = unguided + self.guidance * (guided - unguided)
            x = x + _wide(next_level - level) * hold_first(velocity, given)
        return (latents - x) / _wide(self.levels[steps] - self.levels[steps + 1])

    def walk(
        self, latents: Tensor, chosen: Tensor, predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Segments, Tensor]:
        """Return all segments from noise to videos, and the latents at the end.

        ``predict`` returns the velocity of latents at the student's steps (B), of the chosen conditions (B).
        """
        given, parts, x = self.conditions.given[chosen], [], latents
        for step in range(self.num_steps):
            steps = torch.full_like(chosen, step)
            velocity = hold_first(predict(x, steps, chosen).float(), given)
            parts.append((x, velocity, steps, chosen))
            x = self.advance(x, velocity, steps)
        return Segments(*map(torch.cat, zip(*parts, strict=True))), x

    def follow_teacher(self, num_videos: int) -> Segments:
        """Return the segments of videos of the teacher."""
        chosen, noise = self._start(num_videos)
        return self.walk(noise, chosen, self.lead)[0]

    def follow_student(self, student: Denoiser, num_videos: int) -> Segments:
        """Return the teacher's segments from where the student gets to, in videos of its own."""
        chosen, noise = self._start(num_videos)
        own, _ = self.walk(noise, chosen, partial(self.predict, student))
        return replace(own, velocities=self.lead(own.starts, own.steps, own.chosen))

    def _start(self, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.conditions.texts), (count,), device=self.device)
        noise = torch.randn(count, *self.latent_size, device=self.device)
        return chosen, self.conditions.start(chosen, noise)


def _wide(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1, 1)


def hold_first(velocity: Tensor, given: Tensor) -> Tensor:
    """Return velocities (B, C, T, h, w) with zeros for first frames that are given (B)."""
    first = velocity[:, :, :1] * ~_wide(given)
    return torch.cat([first, velocity[:, :, 1:]], dim=2)


class Pool:
    """Segments to learn from, in float16; when it is full, the oldest are replaced."""

    def __init__(self, size: int, latent_size: tuple[int, ...], device: torch.device) -> None:
        shape = (size, *latent_size)
        starts, velocities = (
            torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2)
        )
        steps, chosen = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(2))
        self.segments = Segments(starts, velocities, steps, chosen)
        self.size, self.num_filled, self._position = size, 0, 0

    def add(self, segments: Segments) -> None:
        """Add segments, or replace the oldest by them."""
        rows = (torch.arange(len(segments.steps)) + self._position) % self.size
        for own, new in zip(self.segments.tensors(), segments.tensors(), strict=True):
            own[rows.to(own.device)] = new.to(own.dtype)
        self._position = (self._position + len(rows)) % self.size
        self.num_filled = min(self.size, self.num_filled + len(rows))

    def close(self) -> None:
        """Let no more segments in than there are: further ones replace the oldest."""
        self.size, self._position = self.num_filled, self._position % self.num_filled

    def draw(self, batch: int) -> Segments:
        """Return random ones, float32."""
        rows = torch.randint(self.num_filled, (batch,), device=self.segments.steps.device)
        starts, velocities, steps, chosen = (tensor[rows] for tensor in self.segments.tensors())
        return Segments(starts.float(), velocities.float(), steps, chosen)
