"""Distillation of the toy: the teacher's segments, that a student learns them, and what is written."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from toy import distill
from toy.denoiser import TRANSFORMER_FILE, Denoiser, load_caption_encoder, load_denoiser
from toy.lora import LoraLinear
from toy.segments import Conditions, Course, Pool, Segments, hold_first
from wan_dist.planning.noise_schedule import compute_shifted_sigmas

CPU = torch.device("cpu")
LATENT_SIZE = (16, 2, 4, 4)
NUM_STEPS = 4


@pytest.fixture(scope="module")
def course() -> Course:
    torch.manual_seed(0)
    encode = load_caption_encoder(CPU)
    texts = encode(
        ["a red circle moving right on a blue background", "黄色背景上，一个绿色方块旋转"]
    )
    conditions = Conditions(
        texts, torch.randn(2, 16, 1, 4, 4), torch.tensor([False, True]), encode([""])
    )
    options = distill.parse_options(["--out", "unused", "--substeps", "3"])
    return distill.make_course(load_denoiser(CPU), conditions, LATENT_SIZE, options)


def make_student(rank: int) -> Denoiser:
    options = distill.parse_options(["--out", "unused", "--rank", str(rank)])
    return distill.make_student(options, CPU)


def predict(course: Course, denoiser: Denoiser) -> Tensor:
    torch.manual_seed(1)
    steps, chosen = torch.arange(NUM_STEPS), torch.tensor([0, 1, 0, 1])
    return course.predict(denoiser, torch.randn(NUM_STEPS, *LATENT_SIZE), steps, chosen)


@torch.no_grad()
def test_segments_are_those_of_eulers_rule_with_guidance(course: Course) -> None:
    segments = course.follow_teacher(6)
    rows = [tensor.unflatten(0, (NUM_STEPS, 6)) for tensor in segments.tensors()]
    starts, velocities, steps, chosen = rows
    sigmas = compute_shifted_sigmas(NUM_STEPS * 3, 3.0, largest_sigma=1.0)
    assert set(chosen[0].tolist()) == {0, 1}
    for video, condition in enumerate(chosen[0].tolist()):
        is_given = bool(course.conditions.given[condition])
        x = starts[0, video : video + 1]
        if is_given:
            torch.testing.assert_close(x[0, :, :1], course.conditions.known[condition])
        for index, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
            step, part = divmod(index, 3)
            if part == 0:
                torch.testing.assert_close(x[0], starts[step, video], atol=1e-4, rtol=1e-4)
                assert steps[step, video] == step
            both = []
            for text in (course.conditions.texts[condition], course.conditions.no_text[0]):
                contexts = course.teacher.project(text.unsqueeze(0))
                timesteps = torch.tensor([[0.0 if is_given else 1000 * sigma, 1000 * sigma]])
                both.append(course.teacher.transformer(x, timesteps, contexts, course.rotary))
            guided = both[1] + 4.0 * (both[0] - both[1])
            known = x[:, :, :1]
            x = x + (next_sigma - sigma) * guided
            if is_given:
                x = torch.cat([known, x[:, :, 1:]], dim=2)
        level = compute_shifted_sigmas(NUM_STEPS, 3.0, largest_sigma=1.0)[NUM_STEPS - 1]
        end = starts[-1, video] - level * velocities[-1, video]
        torch.testing.assert_close(x[0], end, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_later_segments_begin_where_the_student_gets_to(course: Course) -> None:
    student = make_student(2)
    for module in student.modules():
        if isinstance(module, LoraLinear):
            for up in module.up:
                up.normal_(std=0.1)
    starts, velocities, steps, chosen = course.follow_student(student, 3).tensors()
    assert steps.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    levels = compute_shifted_sigmas(NUM_STEPS, 3.0, largest_sigma=1.0)
    given = course.conditions.given[chosen]
    found = hold_first(course.predict(student, starts, steps, chosen), given)
    for row in range(9):
        step = int(steps[row])
        reached = starts[row] + (levels[step + 1] - levels[step]) * found[row]
        torch.testing.assert_close(starts[row + 3], reached, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(velocities, course.lead(starts, steps, chosen))
    assert (velocities - found).abs().max() > 0.1


@pytest.mark.parametrize("rank", [8, 0])
def test_what_is_written_is_the_student(course: Course, tmp_path: Path, rank: int) -> None:
    """Its averaged weights, in the precision of the file, merged by the runs' own loader."""
    training = distill.Training(make_student(rank), course, Pool(8, LATENT_SIZE, CPU), 8)
    training.averages.values = [
        (value + 0.05 * torch.randn_like(value))
        .to(torch.float16 if rank else torch.bfloat16)
        .float()
        for value in training.averages.values
    ]
    training.save(tmp_path)
    training.averages.copy_to_parameters()
    if rank:
        file = tmp_path / distill.name_lora(NUM_STEPS)
        loaded = load_denoiser(CPU, lora=file)
        tensors = load_file(file)
        assert tensors["diffusion_model.blocks.6.self_attn.k.lora_down.weight"].shape == (8, 192)
        assert len(tensors) == 3 * 10 * 7
        assert {float(value) for key, value in tensors.items() if key.endswith("alpha")} == {8.0}
    else:
        loaded = load_denoiser(CPU, file=tmp_path / TRANSFORMER_FILE)
    with torch.no_grad():
        wanted = predict(course, training.student)
        torch.testing.assert_close(predict(course, loaded), wanted, atol=1e-4, rtol=1e-4)
        assert (predict(course, load_denoiser(CPU)) - wanted).abs().max() > 0.1


def test_the_student_learns_and_goes_on(course: Course, tmp_path: Path) -> None:
    torch.manual_seed(2)
    pool = Pool(64, LATENT_SIZE, CPU)
    with torch.no_grad():
        pool.add(course.follow_teacher(16))
    options = distill.parse_options(["--out", str(tmp_path), "--rank", "16"])
    options.rate, options.steps, options.seconds, options.own_from = 2e-3, 40, 600.0, 2.0
    training = distill.Training(distill.make_student(options, CPU), course, pool, 16)

    def measure() -> float:
        rows = pool.segments
        with torch.no_grad():
            found = course.predict(training.student, rows.starts.float(), rows.steps, rows.chosen)
            error = hold_first(found - rows.velocities, course.conditions.given[rows.chosen])
            return float(error.square().mean())

    before = measure()
    with torch.enable_grad():
        distill.train(training, options)
    after = measure()
    assert after < 0.6 * before, (before, after)
    again = distill.Training(distill.make_student(options, CPU), course, pool, 16)
    again.restore(tmp_path)
    for one, other in zip(again.parameters, training.parameters, strict=True):
        torch.testing.assert_close(one, other)
    options.rank = 4
    other_rank = distill.Training(distill.make_student(options, CPU), course, pool, 16)
    with pytest.raises(SystemExit, match="another --rank"):
        other_rank.restore(tmp_path)


def test_a_full_pool_replaces_the_oldest() -> None:
    def number(first: int, count: int) -> Segments:
        numbers = torch.arange(first, first + count)
        latents = numbers.view(-1, 1, 1, 1, 1).expand(-1, *LATENT_SIZE).float()
        return Segments(latents, -latents, numbers, numbers)

    pool = Pool(10, LATENT_SIZE, CPU)
    pool.add(number(0, 8))
    pool.close()
    pool.add(number(8, 3))
    pool.add(number(11, 6))
    for tensor, sign in zip(pool.segments.tensors(), (1, -1, 1, 1), strict=True):
        rows = (sign * tensor[:8]).flatten(1).float() if tensor.dim() > 1 else tensor[:8, None]
        assert (rows == torch.tensor([16, 9, 10, 11, 12, 13, 14, 15]).view(-1, 1)).all()
    drawn = pool.draw(200)
    assert set(drawn.steps.tolist()) == set(range(9, 17))
    assert torch.equal(drawn.starts[:, 0, 0, 0, 0].long(), drawn.steps)


def test_the_command_writes_a_lora_and_its_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--tiny", "--pool", "32", "--batch", "4", "--substeps", "1", "--captions", "1"]
    with torch.enable_grad():
        distill.main(["--out", str(tmp_path), *small, "--steps", "2", "--own-from", "0"])
    assert "student, first frame given, 1 videos: right " in capsys.readouterr().out
    assert (tmp_path / distill.name_lora(NUM_STEPS)).stat().st_size < 2.2e6
    assert (tmp_path / "pool-000.pt").exists()
    with pytest.raises(SystemExit, match="was made with"):
        distill.main(["--out", str(tmp_path), *small, "--guidance", "2"])
