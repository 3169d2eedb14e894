"""Previews: the map of each VAE, what of a step is shown, and a writer that never holds up the steps."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.preview_map import fit_preview_map, shrink_frames
from toy.render import render
from toy.scenes import draw_scene
from wan_dist.config.output_section import OutputConfig
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.preview_map import get_preview_map
from wan_dist.pipeline import preview
from wan_dist.pipeline.preview import PreviewWriter, project_latents
from wan_dist.planning.noise_schedule import NoiseSchedule
from wan_dist.runtime.errors import InputError
from wan_dist.sampling.noise import NoiseSource
from wan_dist.sampling.solvers import Euler
from wan_dist.tasks.published_dims import DIMS_VAE_21, DIMS_VAE_22
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.components import load_vae

TOY_DIMS = TASKS["toy"].vae_dims
TOY_CHECKPOINT = Path(__file__).parents[3] / "toy" / "checkpoint"


@pytest.fixture(scope="module")
def toy_pairs() -> list[tuple[Tensor, Tensor]]:
    """Latents and frames of a few scenes, from the toy's encoder."""
    vae, chance, pairs = load_vae(TOY_CHECKPOINT, task="toy"), random.Random(5), []
    for _ in range(10):
        (video,) = render([draw_scene(chance)], chance, torch.device("cpu"), size=96, num_frames=5)
        with torch.no_grad():
            latents = vae.encode([video[None, :, :1], video[None, :, 1:]])
        pairs.append((latents[0], video))
    return pairs


def test_a_linear_map_is_found_by_the_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    factors, bias = torch.randn(16, 3, generator=generator), torch.randn(3, generator=generator)
    latents = torch.randn(16, 3, 4, 6, generator=generator)
    colors = torch.einsum("cthw,cd->dthw", latents, factors) + bias[:, None, None, None]
    frames = colors.repeat_interleave(8, 2).repeat_interleave(8, 3)
    frames = torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(4, 1)], dim=1)
    assert torch.allclose(shrink_frames(frames, 3, (4, 6)), colors, atol=1e-6)
    found_factors, found_bias, share = fit_preview_map([(latents, frames)])
    assert torch.allclose(found_factors.float(), factors, atol=1e-4)
    assert torch.allclose(found_bias.float(), bias, atol=1e-4)
    assert share > 1 - 1e-6


def test_the_toys_map_is_a_fit(toy_pairs: list[tuple[Tensor, Tensor]]) -> None:
    """It explains nearly as much of other scenes as a map that is fitted to them."""
    _, _, best_share = fit_preview_map(toy_pairs)
    shown, true = [], []
    for latents, frames in toy_pairs:
        size = (latents.shape[2], latents.shape[3])
        small = shrink_frames(frames, latents.shape[1], size)
        for index in range(latents.shape[1]):
            shown.append(show(latents[:, index]) / 127.5 - 1)
            true.append(small[:, index].permute(1, 2, 0))
    expected = torch.stack(true)
    error = (torch.stack(shown) - expected).square().sum()
    share = 1 - error / (expected - expected.mean((0, 1, 2))).square().sum()
    assert best_share > 0.8
    assert share > best_share - 0.1, (share, best_share)


def show(latents: Tensor, dims: VaeDims = TOY_DIMS) -> Tensor:
    preview_map = get_preview_map(dims)
    return project_latents(
        latents, torch.tensor(preview_map.factors), torch.tensor(preview_map.bias)
    ).float()


@pytest.mark.parametrize("dims", [DIMS_VAE_21, DIMS_VAE_22, TOY_DIMS])
def test_each_vae_has_a_map_of_its_channels(dims: VaeDims) -> None:
    preview_map = get_preview_map(dims)
    assert len(preview_map.factors) == dims.latent_dim
    assert get_preview_map(VaeDims(dim=7, decoder_dim=7, latent_dim=dims.latent_dim)).factors
    latents = torch.randn(dims.latent_dim, 6, 10, generator=torch.Generator().manual_seed(0))
    colors = torch.einsum("chw,cd->hwd", latents, torch.tensor(preview_map.factors))
    expected = (colors + torch.tensor(preview_map.bias) + 1) * 127.5
    assert (show(latents, dims) - expected.clamp(0, 255)).abs().max() <= 0.5 + 1e-3
    assert 5 < show(latents, dims).std() < 120  # normal latents are neither grey nor noise alone


def open_writer(
    file: Path, interval: int = 1, report: Callable[[int], None] = lambda num_done: None
) -> PreviewWriter:
    return PreviewWriter(
        file,
        TOY_DIMS,
        torch.device("cpu"),
        interval=interval,
        frame_index=1,
        report_written=report,
    )


def test_what_a_step_predicts_is_shown(tmp_path: Path) -> None:
    """The clean latents x - σ v: the same picture at each step of a model that knows them."""
    generator = torch.Generator().manual_seed(0)
    clean = 0.3 * torch.randn(1, 16, 3, 6, 10, generator=generator)
    noise = torch.randn(1, 16, 3, 6, 10, generator=generator)
    schedule = NoiseSchedule(sigmas=(1.0, 0.7, 0.3, 0.0), timesteps=(1000.0, 700.0, 300.0))
    solver = Euler(schedule, NoiseSource((16, 3, 6, 10), seed=0, device="cpu"))
    reports: list[int] = []
    expected = show(clean[0, :, 1]).numpy()
    latents = noise
    for start in (0, 1, 2):  # as after a resume
        writer = open_writer(tmp_path / "a.preview.jpg", report=reports.append)
        predict = writer.wrap(lambda *_: noise - clean, solver, start)
        velocity = predict(latents, solver.timesteps[start])
        assert torch.equal(velocity, noise - clean)
        latents = solver.step(start, latents, velocity)
        writer.close()
        with Image.open(tmp_path / "a.preview.jpg") as picture:
            assert picture.size == (40, 24)
            small = np.asarray(picture.resize((10, 6), Image.Resampling.BOX), dtype=float)
        assert np.abs(small - expected).mean() < 12
    assert reports == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["a.preview.jpg"]


def test_only_every_nth_step_is_shown(tmp_path: Path) -> None:
    reports: list[int] = []
    latents = torch.zeros(16, 3, 6, 10)
    for num_done in range(1, 8):
        writer = open_writer(tmp_path / "a.jpg", interval=3, report=reports.append)
        writer.show_prediction(num_done, latents, latents, 0.5)
        writer.close()
    assert reports == [3, 6]


def test_steps_do_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[int] = []
    may_write = threading.Event()
    original = preview.atomic_write

    def write_slowly(path: Path) -> object:
        assert may_write.wait(60)
        return original(path)

    monkeypatch.setattr(preview, "atomic_write", write_slowly)
    writer = open_writer(tmp_path / "a.jpg", report=reports.append)
    latents = torch.zeros(16, 3, 6, 10)
    for num_done in range(1, 6):
        writer.show_prediction(num_done, latents, latents, 0.5)
    assert not list(tmp_path.iterdir())
    may_write.set()
    writer.close()
    assert reports == [1]
    assert (tmp_path / "a.jpg").exists()


def test_a_picture_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[int] = []
    writer = open_writer(tmp_path / "gone" / "a.jpg", report=reports.append)
    latents = torch.zeros(16, 3, 6, 10)
    for num_done in range(1, 4):
        writer.show_prediction(num_done, latents, latents, 0.5)
        while (pending := writer._pending_write) is not None and not pending.done():
            pending.result()
    writer.close()
    assert not reports
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'gone' / 'a.jpg'} cannot be written: No such file or directory"
    ]


def test_the_number_of_steps_is_read() -> None:
    intervals = [OutputConfig(preview=value).preview_interval for value in (False, True, 0, 1, 5)]
    assert intervals == [0, 1, 0, 1, 5]
    for value in (-1, 0.5, "often", [1], None):
        with pytest.raises(InputError, match=r"output.preview=.* must be true, false, or a number"):
            OutputConfig(preview=value)
