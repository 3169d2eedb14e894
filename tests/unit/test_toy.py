"""What the toy model is trained on and judged by; that what is trained is what is run."""

import copy
import random
from pathlib import Path

import torch
from torch import nn

from toy import train
from toy.descent import Descent
from toy.judge import judge
from toy.render import render
from toy.scenes import COLORS, MOTIONS, SHAPES, Scene, all_scenes, caption, draw_scene
from toy.tokenizer import save_tokenizer
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.model import WanVae, split_frames_into_chunks
from wan_dist.models.vae.plain import decode_latents, encode_moments
from wan_dist.pipeline.decode import convert_to_uint8_frames
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.hub import check_checkpoint_complete
from wan_dist.weights.key_maps import map_original_vae
from wan_dist.weights.layout import TOKENIZER_FOLDER
from wan_dist.weights.write import export_tensors

CPU = torch.device("cpu")


def shuffled(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def test_the_vae_that_is_trained_is_the_one_that_is_run() -> None:
    torch.manual_seed(0)
    vae = shuffled(WanVae(VaeDims(dim=8, decoder_dim=8)))
    video = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(split_frames_into_chunks(video))
        mean, std = vae.get_latent_statistics(latents)
        trained, _ = encode_moments(vae, video)
        torch.testing.assert_close(latents * std + mean, trained, atol=1e-5, rtol=1e-5)
        shown = torch.cat(list(vae.decode(latents)), dim=2)
        torch.testing.assert_close(
            shown, decode_latents(vae, trained).clamp(-1, 1), atol=1e-5, rtol=1e-5
        )


def test_normalised_latents_have_the_published_moments() -> None:
    torch.manual_seed(0)
    vae = shuffled(WanVae(VaeDims(dim=8, decoder_dim=8)))
    chance = random.Random(0)
    video = render([draw_scene(chance) for _ in range(2)], chance, CPU, size=32, num_frames=5)
    with torch.no_grad():
        before = decode_latents(vae, encode_moments(vae, video)[0])
        train.normalise(vae, random.Random(0), CPU)
        torch.testing.assert_close(
            decode_latents(vae, encode_moments(vae, video)[0]), before, atol=1e-3, rtol=1e-3
        )
        chance = random.Random(0)
        latents = vae.encode(
            split_frames_into_chunks(render([draw_scene(chance) for _ in range(4)], chance, CPU))
        )
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.02
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.02


def test_what_is_drawn_is_judged_right() -> None:
    chance = random.Random(1)
    scenes = [draw_scene(chance) for _ in range(24)] + chance.sample(list(all_scenes()), 24)
    for scene, video in zip(scenes, render(scenes, chance, CPU), strict=True):
        frames = convert_to_uint8_frames(video).numpy()
        assert judge(frames, scene).right, (scene, judge(frames, scene).seen)


def test_what_is_wrong_is_judged_wrong() -> None:
    chance = random.Random(2)
    scenes = chance.sample(list(all_scenes()), 6)
    for scene, video in zip(scenes, render(scenes, chance, CPU), strict=True):
        frames = convert_to_uint8_frames(video).numpy()
        (thing,) = scene.things
        for motion in set(MOTIONS) - {thing.motion}:
            assert not judge(
                frames, Scene((type(thing)(thing.color, thing.shape, motion),), scene.background)
            ).motions
        for color in set(COLORS) - {thing.color, scene.background}:
            assert not judge(
                frames, Scene((type(thing)(color, thing.shape, thing.motion),), scene.background)
            ).colors
            assert not judge(frames, Scene(scene.things, color)).background
    noise = torch.randint(0, 256, (33, 64, 64, 3), dtype=torch.uint8).numpy()
    assert not any(judge(noise, scene).right for scene in scenes)


def test_what_is_held_out_is_not_trained_on() -> None:
    chance = random.Random(3)
    assert not any(draw_scene(chance).is_held_out for _ in range(2000))
    held = [scene for scene in all_scenes() if scene.is_held_out]
    assert {scene.things[0].shape for scene in held} == set(SHAPES)
    assert {scene.things[0].motion for scene in held} == set(MOTIONS)
    assert {scene.background for scene in held} == set(COLORS)


def test_captions_fit_the_tokenizer() -> None:
    chance = random.Random(4)
    tokenizer = train.make_tokenizer(random.Random(0), 2000)
    texts = [caption(draw_scene(chance), chance) for _ in range(300)]
    assert max(len(tokenizer.encode(text).ids) for text in texts) <= train.DIMS.transformer.text_len
    assert len({tuple(tokenizer.encode(text).ids) for text in texts}) == len(
        {text.lower() for text in texts}
    )
    assert tokenizer.encode("A red STAR 🐈").ids[:3] == tokenizer.encode("a red star").ids[:3]


def test_matrices_go_down_as_with_pytorchs_muon() -> None:
    """PyTorch's goes through them one at a time."""
    torch.manual_seed(0)
    with torch.enable_grad():
        ours = nn.ModuleList([nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 24)])
        theirs = copy.deepcopy(ours)
        descent = Descent(ours.named_parameters(), lambda name, _: name.endswith("weight"))
        descent.rate.fill_(1e-2)
        muon = torch.optim.Muon(
            [layer.weight for layer in theirs],
            lr=1e-2,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        )
        adam = torch.optim.AdamW(
            [layer.bias for layer in theirs], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01
        )
        for _ in range(5):
            x = torch.randn(8, 24)
            descent.step(sum(layer(x[:, : layer.in_features]).square().mean() for layer in ours))
            for optimizer in (muon, adam):
                optimizer.zero_grad()
            sum(layer(x[:, : layer.in_features]).square().mean() for layer in theirs).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            for optimizer in (muon, adam):
                optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_training_writes_a_checkpoint_that_is_read(tmp_path: Path) -> None:
    clips = (
        torch.randn(4, 16, 2, 4, 4).bfloat16(),
        torch.randint(1, 600, (4, 2, 64)),
        torch.ones(64, dtype=torch.long),
    )
    (tmp_path / TOKENIZER_FOLDER).mkdir(parents=True)
    save_tokenizer(train.make_tokenizer(random.Random(0), 500), tmp_path / TOKENIZER_FOLDER)
    train.save(
        export_tensors(train.halved(WanVae(train.DIMS.vae)), map_original_vae([])),
        tmp_path / "Wan2.1_VAE.safetensors",
    )
    with torch.enable_grad():
        train.train_transformer(clips, 2, 2, CPU, tmp_path)
    check_checkpoint_complete(tmp_path, TASKS["toy"])
