"""One rank of the check that a video split over ranks is encoded and decoded to what one rank makes of it."""

import itertools
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import golden_folder, has_golden
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.model import Decoder, WanVae, split_frames_into_chunks
from wan_dist.models.vae.video_state import VideoState
from wan_dist.parallel.mesh import Axis, open_process_groups
from wan_dist.parallel.vae_split import encode_split_video
from wan_dist.pipeline import decode as vae_work
from wan_dist.pipeline.decode import convert_to_float32_frames, decode_latents
from wan_dist.planning.degrees import Degrees
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
VAES = {
    "2.1": VaeDims(dim=6, decoder_dim=6),
    "2.2": VaeDims(dim=4, decoder_dim=6, latent_dim=48, residual=True),
}
GOLDENS = (
    ("vae21", "t2v-1.3B", "wan2.1-t2v", "wan21"),
    ("vae22", "ti2v-5B", "wan2.2-ti2v-5b", "wan22"),
)
SIZES = (
    (5, 8),
    (5, 9),
    (11, 4),
)  # rows and columns of the latents: even and uneven shares, either side


def random_vae(dims: VaeDims) -> WanVae:
    torch.manual_seed(0)
    vae = WanVae(dims).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "gamma" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    return vae


def main(folder: Path) -> None:
    num_ranks, found = int(os.environ["WORLD_SIZE"]), {}
    with (
        torch.no_grad(),
        open_process_groups(Degrees(ulysses=num_ranks), CPU, timeout_seconds=120) as groups,
    ):
        axis = groups.replica
        cases = [
            *itertools.product(VAES.items(), SIZES, (1, 4)),
            (("2.1", VAES["2.1"]), (5, 9), 9),
        ]
        for (name, dims), (rows, columns), num_latents in cases:
            vae = random_vae(dims)
            latents = torch.randn(dims.latent_dim, num_latents, rows, columns)
            frames = list(
                decode_latents(
                    vae, latents, convert_to_float32_frames, VaeStrategy("parallel"), axis
                )
            )
            assert bool(frames) == (groups.rank == 0)
            video = (
                torch.rand(
                    1,
                    3,
                    4 * num_latents - 3,
                    rows * dims.spatial_scale,
                    columns * dims.spatial_scale,
                )
                * 2
                - 1
            )
            encoded = encode_split_video(vae, split_frames_into_chunks(video), axis)
            case = f"{name} {rows}x{columns}x{num_latents}"
            if groups.rank == 0:
                expected = vae.encode(split_frames_into_chunks(video))
                assert encoded.shape == expected.shape
                found[f"encode {case}"] = (encoded - expected).abs().max().item()
                whole = torch.cat(
                    list(
                        decode_latents(
                            vae, latents, convert_to_float32_frames, VaeStrategy("whole"), Axis()
                        )
                    )
                )
                assert whole.shape == torch.cat(frames).shape
                assert whole.std() > 0.05  # not all clamped or zero
                found[f"decode {case}"] = (torch.cat(frames) - whole).abs().max().item()
        for name, task, checkpoint, file in GOLDENS:
            if (
                has_golden(checkpoint) and num_ranks < 4
            ):  # frames of 5 x 7 and 4 x 6 latent pixels are too small for four
                vae = open_checkpoint(
                    golden_folder(checkpoint), TASKS[task], torch.float32
                ).vae.load(CPU)
                golden = load_file(
                    golden_folder(checkpoint).parent / f"components/{file}.safetensors"
                )
                latents = encode_split_video(
                    vae, split_frames_into_chunks(golden[f"{name}.video"][None]), axis
                )
                found[f"encode golden {name}"] = (
                    (latents[0] - golden[f"{name}.latent"]).abs().max().item()
                )
                frames = list(
                    decode_latents(
                        vae,
                        golden[f"{name}.latent"],
                        convert_to_float32_frames,
                        VaeStrategy("parallel"),
                        axis,
                    )
                )
                if groups.rank == 0:
                    found[f"decode golden {name}"] = (
                        (torch.cat(frames).permute(3, 0, 1, 2) - golden[f"{name}.decoded"])
                        .abs()
                        .max()
                        .item()
                    )
        if groups.rank == 0:
            (folder / "errors.json").write_text(json.dumps(found))

        vae = random_vae(VAES["2.1"])

        def work(state: VideoState) -> torch.Tensor:
            return vae.decoder(torch.zeros(1, 16, 1, 4, 6), state)

        finish = Decoder.compute_frames  # a rank without memory must not leave the others waiting

        def scarce(self: Decoder, *arguments: object) -> torch.Tensor:
            if groups.rank == num_ranks - 1:
                raise torch.OutOfMemoryError
            return finish(self, *arguments)

        Decoder.compute_frames = scarce
        assert not vae_work.can_all_ranks_run(work, vae, axis)
        Decoder.compute_frames = finish
        assert vae_work.can_all_ranks_run(work, vae, axis)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
