"""Training of the toy model from scratch: first the VAE, then text encoder and transformer together.

python -m toy.train toy/checkpoint
python -m toy.train FOLDER --vae-steps 4 --clips 8 --steps 4 --batch 4      # a try on a CPU

Runs on one GPU and writes the checkpoint.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from toy.denoiser import (
    DIMS,
    TEXT_ENCODER_NAME,
    TRANSFORMER_FILE,
    VAE_FILE,
    Denoiser,
    autocast,
    embed_captions,
    list_denoiser_tensors,
    list_token_ids,
    load_vae,
)
from toy.descent import Averages, Descent, compute_rate, is_block_matrix, recorded
from toy.render import NUM_FRAMES, SIZE, render
from toy.scenes import caption, draw_scene
from toy.tokenizer import SPECIAL_TOKENS, add_end_mark, save_tokenizer
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.vae.model import WanVae
from wan_dist.models.vae.plain import decode_latents, encode_moments
from wan_dist.weights.key_maps import map_original_text_encoder, map_original_vae
from wan_dist.weights.layout import TOKENIZER_FOLDER
from wan_dist.weights.write import export_tensors, write_transformer_config

_DIVERGENCE = 3e-4
"""Weight of the KL divergence in the VAE's loss."""
_EMPHASIS = 5.0
"""Weight in the VAE's loss of the pixels of things, which are few, relative to those of the background."""
_VAE_RATE, _RATE = 1e-3, 1.5e-3
"""Peak learning rates of the VAE, and of text encoder and transformer."""
_STEPS_AN_AVERAGE = 10
"""Steps between two updates of the averaged weights."""
_SHIFT = 3.0
"""Shift of the noise levels in training: above 1, more of them are high."""

Clips = tuple[Tensor, Tensor, Tensor]
"""Training data of the transformer.

Normalised latents (N, C, T, h, w) in bfloat16, the tokens of two captions of each (N, 2, n), and those of the
empty caption (n,).
"""


def main() -> None:
    """Train the model and write its checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae-steps", type=int, default=5600)
    parser.add_argument("--clips", type=int, default=28000)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--vae", type=Path, help="a VAE's file to go on from, instead of training one"
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    chance = random.Random(options.seed)
    begun = time.perf_counter()
    (options.folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    if options.vae is None:
        vae = WanVae(DIMS.vae).to(device)
        train_vae(vae, options.vae_steps, chance, device)
        save(
            export_tensors(halved(vae), map_original_vae([])),
            options.folder / VAE_FILE,
        )
    else:
        vae = load_vae(device, options.vae)
    print(f"VAE: {time.perf_counter() - begun:.0f} s", flush=True)
    torch.manual_seed(options.seed + 1)  # whether the VAE was trained now or before
    chance = random.Random(options.seed + 1)
    tokenizer = make_tokenizer(random.Random(options.seed))
    save_tokenizer(tokenizer, options.folder / TOKENIZER_FOLDER)
    clips = make_clips(vae, tokenizer, options.clips, chance, device)
    print(f"clips: {time.perf_counter() - begun:.0f} s", flush=True)
    train_transformer(clips, options.steps, options.batch, device, options.folder)
    print(f"all: {time.perf_counter() - begun:.0f} s", flush=True)


def halved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters in bfloat16."""
    return ((name, parameter.detach().bfloat16()) for name, parameter in model.named_parameters())


def save(tensors: Iterable[tuple[str, Tensor]], file: Path) -> None:
    """Write tensors into a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors}, file)


def train_vae(vae: WanVae, steps: int, chance: random.Random, device: torch.device) -> None:
    """Train the VAE to reconstruct videos.

    The loss is absolute and squared error, and a small KL divergence from a normal distribution.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    descent = Descent(vae.named_parameters(), lambda *_: False)

    def loss_of(video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = encode_moments(vae, video)
        difference = decode_latents(vae, mean + (log_variance / 2).exp() * noise) - video
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).mean()
        background = video[..., :1, :1]  # the corner shows it
        is_thing = (video - background).abs().amax(1, keepdim=True) > 0.1
        weight = 1 + (_EMPHASIS - 1) * is_thing
        squared = difference.square()
        error = (weight * (difference.abs() + squared)).mean()
        return error + _DIVERGENCE * divergence, squared.mean()

    compiled = torch.compile(loss_of, dynamic=False) if device.type == "cuda" else loss_of
    batch = 8 if device.type == "cuda" else 2
    for step in range(steps):
        video = render([draw_scene(chance) for _ in range(batch)], chance, device)
        noise = torch.randn(
            batch, DIMS.vae.latent_dim, NUM_FRAMES // 4 + 1, SIZE // 8, SIZE // 8, device=device
        )
        with autocast(device):
            loss, squared = compiled(video, noise)
        descent.rate.fill_(compute_rate(step, steps, _VAE_RATE))
        descent.step(loss)
        if step % 200 == 0 or step == steps - 1:
            print(
                f"vae {step} loss {loss.item():.4f} PSNR {-10 * squared.div(4).log10().item():.1f}",
                flush=True,
            )
    normalise(vae, chance, device)


@torch.no_grad()
def normalise(vae: WanVae, chance: random.Random, device: torch.device) -> None:
    """Normalise the latents to the mean and deviation of the published VAE, which pipelines expect.

    The scale is folded into the convolutions before and after the latents.
    """
    scenes = [draw_scene(chance) for _ in range(64 if device.type == "cuda" else 4)]
    with autocast(device):
        mean, _ = encode_moments(vae, render(scenes, chance, device))
    mu, sigma = mean.mean((0, 2, 3, 4)), mean.std((0, 2, 3, 4))
    wanted_mean, wanted_std = (moment.flatten() for moment in vae.get_latent_statistics(mean))
    first, scale = vae.conv1, wanted_std / sigma
    assert first.bias is not None
    first.weight[: len(mu)] *= scale.view(-1, 1, 1, 1, 1)
    first.bias[: len(mu)] = (first.bias[: len(mu)] - mu) * scale + wanted_mean
    assert vae.conv2.bias is not None
    vae.conv2.bias += vae.conv2.weight.flatten(1) @ (mu - wanted_mean / scale)
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)


def make_tokenizer(chance: random.Random, num_captions: int = 20000) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on captions; it takes any text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DIMS.text_encoder.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (caption(draw_scene(chance), chance) for _ in range(num_captions)), trainer
    )
    return add_end_mark(tokenizer)


@torch.no_grad()
def make_clips(
    vae: WanVae,
    tokenizer: Tokenizer,
    count: int,
    chance: random.Random,
    device: torch.device,
) -> Clips:
    """Return encoded videos with captions."""
    latents, texts = [], []
    for start in range(0, count, 64):
        scenes = [draw_scene(chance) for _ in range(min(64, count - start))]
        with autocast(device):
            found, _ = encode_moments(vae, render(scenes, chance, device))
        mean, std = vae.get_latent_statistics(found)
        latents.append(((found - mean) / std).bfloat16())
        texts += [
            [list_token_ids(tokenizer, caption(scene, chance)) for _ in range(2)]
            for scene in scenes
        ]
    return (
        torch.cat(latents),
        torch.tensor(texts, device=device),
        torch.tensor(list_token_ids(tokenizer, ""), device=device),
    )


def _initialise_text_encoder(text_encoder: nn.Module) -> None:
    """Draw the weights as T5's are (its initialisation is a part of its unscaled attention)."""
    dims = DIMS.text_encoder
    for name, parameter in text_encoder.named_parameters():
        if "relative_attention_bias" in name:
            # With the usual 0.09 it takes long to learn which noun a colour stands before.
            nn.init.normal_(parameter, std=1.5)
        elif name.endswith("SelfAttention.q.weight"):
            nn.init.normal_(parameter, std=(dims.dim * dims.head_dim) ** -0.5)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def train_transformer(
    clips: Clips, steps: int, batch: int, device: torch.device, folder: Path
) -> None:
    """Train text encoder and transformer, and write an average of the last steps' weights."""
    text_encoder = build_text_encoder(DIMS.text_encoder, torch.float32).to(device).eval()
    denoiser = Denoiser().to(device)
    _initialise(denoiser.projection, denoiser.transformer)
    _initialise_text_encoder(text_encoder)
    everything = nn.ModuleDict({"text_encoder": text_encoder, "denoiser": denoiser})
    averages = Averages(list(everything.parameters()), decay=0.995)
    descent = Descent(everything.named_parameters(), is_block_matrix)
    loss_of = _flow_matching(
        text_encoder, denoiser, denoiser.transformer.compute_rotary(clips[0][:1])
    )
    compiled = torch.compile(loss_of) if device.type == "cuda" else loss_of

    def descend() -> Tensor:
        drawn = _draw(clips, batch)
        with autocast(device):
            loss = compiled(*drawn)
        descent.step(loss)
        return loss.detach()

    begun = time.perf_counter()
    one_step = recorded(descend, device)
    for step in range(steps):
        # The cosine's last fifth is left out: the average does the same.
        descent.rate.fill_(compute_rate(step, steps * 5 // 4, _RATE))
        loss = one_step()
        if step % _STEPS_AN_AVERAGE == 0:
            averages.update()
        if step % 250 == 0 or step == steps - 1:
            print(
                f"step {step} loss {loss.item():.4f} {time.perf_counter() - begun:.0f} s",
                flush=True,
            )
    averages.copy_to_parameters()
    write_transformer(text_encoder, denoiser, folder)


def _draw(clips: Clips, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a random batch of clips for `_flow_matching`.

    Latents (B, C, T, h, w), noise, its level (B), whether the first frame is given (B), and a caption's
    tokens (B, n). One caption in ten is empty, for guidance; one clip in four is given its first frame.
    """
    latents, texts, nothing = clips
    device = latents.device
    chosen = torch.randint(len(latents), (batch,), device=device)
    x, drawn = latents[chosen].float(), torch.rand(3, batch, device=device)
    ids = texts[chosen, torch.randint(2, (batch,), device=device)]
    ids = torch.where((drawn[0] < 0.1).unsqueeze(1), nothing, ids)
    level = _SHIFT * drawn[1] / (1 + (_SHIFT - 1) * drawn[1])
    return x, torch.randn_like(x), level, drawn[2] < 0.25, ids


def _flow_matching(
    text_encoder: nn.Module, denoiser: Denoiser, rotary: tuple[Tensor, Tensor]
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the flow matching loss (arXiv:2210.02747) of a `_draw`; the velocity is noise minus latents.

    A first frame that is given has a timestep of 0, and its error does not count.
    """

    def loss_of(x: Tensor, noise: Tensor, level: Tensor, given: Tensor, ids: Tensor) -> Tensor:
        contexts = denoiser.project(embed_captions(text_encoder, ids))
        mixed = x + level.view(-1, 1, 1, 1, 1) * (noise - x)
        first = torch.where(given.view(-1, 1, 1, 1, 1), x[:, :, :1], mixed[:, :, :1])
        latents = torch.cat([first, mixed[:, :, 1:]], dim=2)
        found = denoiser(latents, level, given, contexts, rotary)
        error = (found - (noise - x)).square()
        return (
            error[:, :, 1:].mean()
            + (error[:, :, :1].mean((1, 2, 3, 4)) * ~given).mean() / x.shape[2]
        )

    return loss_of


def write_transformer(text_encoder: nn.Module, denoiser: Denoiser, folder: Path) -> None:
    """Write the models in bfloat16, with the transformer's configuration."""
    save(
        list_denoiser_tensors(denoiser.named_parameters()),
        folder / TRANSFORMER_FILE,
    )
    save(
        export_tensors(halved(text_encoder), map_original_text_encoder([])),
        folder / TEXT_ENCODER_NAME,
    )
    write_transformer_config(DIMS.transformer, folder)


@torch.no_grad()
def _initialise(*trained: nn.Module) -> None:
    """Initialize the linears' weights; the output layers of the blocks, and the head, start near zero."""
    for model in trained:
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "norm" in name:
                continue
            if "modulation" in name:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("o.weight", "ffn.2.weight")) or name.startswith(
                ("head.head", "time_projection")
            ):
                nn.init.normal_(parameter, std=0.005)
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


if __name__ == "__main__":
    main()
