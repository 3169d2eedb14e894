"""Previews of an unfinished video: a picture of what a step predicts, written in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.preview_map import get_preview_map
from wan_dist.output.video_file import convert_to_uint8, copy_to_host
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.log import logger
from wan_dist.sampling.solvers import Solver
from wan_dist.sampling.step_cache import VelocityFunction

_JPEG_QUALITY = 85


def project_latents(latents: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """Return latents (C, h, w) of one frame as a picture (h, w, 3), uint8, on the same device.

    ``factors`` (C, 3) and ``bias`` (3,): see `PreviewMap`.
    """
    colors = torch.addmm(bias, latents.float().flatten(1).T, factors)
    return convert_to_uint8(colors).view(*latents.shape[1:], 3)


class PreviewWriter:
    """Writes one latent frame of what each ``interval``-th step predicts, as a JPEG of half the video's size.

    It belongs to the replica's first rank: all ranks have the whole latents, so none waits for another.
    While a picture is being written, the next one is left out. ``report_written`` is called with the number
    of completed steps, in a thread. A picture that cannot be written is logged once.
    """

    def __init__(
        self,
        file: Path,
        dims: VaeDims,
        device: torch.device,
        *,
        interval: int,
        frame_index: int,
        report_written: Callable[[int], None],
    ) -> None:
        self._file, self._interval, self._frame_index = file, interval, frame_index
        self._report_written = report_written
        preview_map = get_preview_map(dims)
        self._factors = torch.tensor(preview_map.factors, device=device)
        self._bias = torch.tensor(preview_map.bias, device=device)
        self._scale = dims.spatial_scale // 2
        self._executor = ThreadPoolExecutor(1)
        self._pending_write: Future[None] | None = None
        self._has_warned = False

    def wrap(self, predict: VelocityFunction, solver: Solver, num_done: int) -> VelocityFunction:
        """Return ``predict``, which is called once a step, such that its predictions are shown."""
        steps = count(num_done)

        def predict_and_show(latents: Tensor, timestep: float) -> Tensor:
            velocity = predict(latents, timestep)
            index = next(steps)
            self.show_prediction(index + 1, latents[0], velocity[0], float(solver.sigmas[index]))
            return velocity

        return predict_and_show

    def show_prediction(
        self, num_done: int, latents: Tensor, velocity: Tensor, sigma: float
    ) -> None:
        """Show x₀ = x - σ v of a step, from latents and velocity (C, T, h, w); does not wait for them."""
        is_busy = self._pending_write is not None and not self._pending_write.done()
        if is_busy or num_done % self._interval:
            return
        x0 = latents[:, self._frame_index] - sigma * velocity[:, self._frame_index]
        picture, copy_event = copy_to_host(project_latents(x0, self._factors, self._bias))
        self._pending_write = self._executor.submit(self._write, picture, copy_event, num_done)

    def _write(self, picture: Tensor, copy_event: torch.cuda.Event | None, num_done: int) -> None:
        if copy_event is not None:
            copy_event.synchronize()
        height, width, _ = picture.shape
        size = (width * self._scale, height * self._scale)
        image = Image.fromarray(picture.numpy()).resize(size, Image.Resampling.BICUBIC)
        try:
            with atomic_write(self._file) as temporary_file:
                image.save(temporary_file, "JPEG", quality=_JPEG_QUALITY)
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s cannot be written: %s", self._file, error.strerror or error)
            self._has_warned = True
            return
        self._report_written(num_done)

    def close(self) -> None:
        """Wait for the picture that is being written; none is written after this."""
        self._executor.shutdown()
