"""VAE time, peak memory and distance from float32 at full size with random weights, beside diffusers.

    python bench/vae.py --sizes 832x480x81 1280x720x81 --peer
    torchrun --nproc_per_node=4 bench/vae.py --sizes 832x480x81

Prints a line for each strategy and writes bench/results/vae-NAME.json. A time is the best of several runs,
after the first ("ready"), from latents on the GPU to uint8 frames on the GPU of the first rank, or from
frames on the GPU to latents.
"""

import argparse
import os
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bench.record import Record
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.model import WanVae, split_frames_into_chunks
from wan_dist.parallel.mesh import Axis, open_process_groups, select_local_device
from wan_dist.pipeline.decode import (
    convert_to_float32_frames,
    convert_to_uint8_frames,
    cudnn_autotuning,
    decode_latents,
    encode_video,
)
from wan_dist.planning.degrees import Degrees
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.key_maps import map_diffusers_vae

DIMS = {"2.1": TASKS["t2v-1.3B"].vae_dims, "2.2": TASKS["ti2v-5B"].vae_dims}
GIB = 2**30


def random_vae(dims: VaeDims, dtype: torch.dtype, device: torch.device) -> WanVae:
    """Return a VAE with random weights, the same for every dtype.

    They are scaled to keep activations near 1 and frames inside [-1, 1].
    """
    torch.manual_seed(0)
    vae = WanVae(dims).to(device).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "gamma" not in name:
            scale = 0.25 if name.startswith("decoder.head") else 1.0
            parameter.normal_(
                std=scale * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.05
            )
    other = WanVae(dims, dtype).to(device).eval().requires_grad_(False)
    other.load_state_dict(vae.state_dict())
    return other.optimize_memory_format()


def diffusers_peer(vae: WanVae, dtype: torch.dtype) -> torch.nn.Module:
    """Return diffusers' VAE with the same weights."""
    from diffusers import AutoencoderKLWan

    config = {}
    if vae.dims.residual:
        config = {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
        }
        config |= {
            "patch_size": 2,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "scale_factor_spatial": 16,
        }
    peer = AutoencoderKLWan(**config)
    keys = map_diffusers_vae([])
    state = {keys.find_sources(name)[0].key: value for name, value in vae.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not missing, missing[:3]
    assert not unexpected, unexpected[:3]
    return peer.to(next(vae.parameters()).device, dtype).eval().requires_grad_(False)


def timed(work: Callable[[], object], runs: int) -> dict[str, float]:
    """Return the first run's seconds, the best of the others and the peak memory."""
    seconds = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB
    return {
        "ready": round(seconds[0], 2),
        "seconds": round(min(seconds[1:]), 3),
        "peak_gib": round(peak, 2),
    }


def distance(frames: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Return the largest difference, and the PSNR in dB for a range of 2."""
    difference = frames.float() - exact.float()
    return {
        "max": round(difference.abs().max().item(), 4),
        "psnr": round(10 * torch.log10(4 / difference.square().mean()).item(), 1),
    }


class Bench:
    """One VAE at one size."""

    def __init__(
        self,
        name: str,
        size: tuple[int, int, int],
        axis: Axis,
        options: argparse.Namespace,
        save: Callable[[dict[str, object]], None],
    ) -> None:
        self.dims, self.axis, self.options = DIMS[name], axis, options
        self.device = torch.device("cuda", torch.cuda.current_device())
        width, height, frames = size
        self.facts = {"vae": name, "size": f"{width}x{height}x{frames}", "ranks": axis.size}
        torch.manual_seed(1)
        shape = (
            self.dims.latent_dim,
            (frames - 1) // 4 + 1,
            height // self.dims.spatial_scale,
            width // self.dims.spatial_scale,
        )
        self.latents = torch.randn(shape, device=self.device)
        self.video_shape = 1, 3, frames, height, width
        self.save = save
        self.few = self.latents[:, :3]
        self.exact: torch.Tensor | None = None
        if axis.size == 1:
            reference = random_vae(self.dims, torch.float32, self.device)
            self.exact = torch.cat(
                list(
                    decode_latents(
                        reference, self.few, convert_to_float32_frames, VaeStrategy("whole"), axis
                    )
                )
            )

    def note(self, what: str, facts: dict[str, float]) -> None:
        """Print and record a row, on the first rank."""
        if self.axis.rank == 0:
            self.save(self.facts | {"way": what} | facts)

    def ours(self, dtype: str) -> None:
        """Measure our VAE: whole and tiled on one GPU, split in strips on several."""
        vae = random_vae(self.dims, getattr(torch, dtype), self.device)
        strategies = ["parallel"] if self.axis.size > 1 else ["whole"]
        for strategy in (
            VaeStrategy(name, at_once=number)
            for name in strategies
            for number in self.options.at_once
        ):
            self.decoding(vae, strategy, dtype)
            self.encoding(vae, strategy, dtype)
        for num_tiles in self.options.tiles if self.axis.size == 1 else ():
            self.decoding(vae, VaeStrategy("tiled", num_tiles), dtype)
            self.encoding(vae, VaeStrategy("tiled", num_tiles), dtype)

    def decoding(self, vae: WanVae, strategy: VaeStrategy, dtype: str) -> None:
        """Measure decoding with one strategy."""
        with cudnn_autotuning(self.dims, strategy):
            facts = timed(
                lambda: deque(
                    decode_latents(vae, self.latents, convert_to_uint8_frames, strategy, self.axis),
                    maxlen=1,
                ),
                self.options.runs,
            )
        if self.exact is not None:
            frames = torch.cat(
                list(decode_latents(vae, self.few, convert_to_float32_frames, strategy, self.axis))
            )
            facts |= distance(frames.to(self.device), self.exact)
        self.note(f"decode {strategy}, {dtype}, {strategy.at_once} at once", facts)

    def encoding(self, vae: WanVae, strategy: VaeStrategy, dtype: str) -> None:
        """Measure encoding with one strategy."""
        if self.options.encode:
            facts = self.timed_on_video(
                lambda video: encode_video(
                    vae, lambda: split_frames_into_chunks(video), strategy, self.axis
                )
            )
            self.note(f"encode {strategy}, {dtype}, {strategy.at_once} at once", facts)

    def timed_on_video(self, work: Callable[[torch.Tensor], object]) -> dict[str, float]:
        """Time work on a random video on the GPU; its bytes are subtracted from the peak memory."""
        video = torch.rand(self.video_shape, device=self.device) * 2 - 1
        facts = timed(lambda: work(video), self.options.runs)
        return facts | {"peak_gib": round(facts["peak_gib"] - video.nbytes / GIB, 2)}

    def peer(self) -> None:
        """Measure diffusers' VAE in bfloat16, with cuDNN's best kernels."""
        torch.backends.cudnn.benchmark = True
        source = random_vae(self.dims, torch.float32, self.device)
        peer = diffusers_peer(source, torch.bfloat16)
        mean, std = source.get_latent_statistics(self.latents)
        raw = (self.latents * std[0] + mean[0]).unsqueeze(0).bfloat16()
        del source
        facts = timed(lambda: peer.decode(raw, return_dict=False), self.options.runs)
        frames = (
            peer.decode(raw[:, :, :3], return_dict=False)[0][0].clamp(-1, 1).permute(1, 2, 3, 0)
        )
        self.note(
            "diffusers decode, bfloat16",
            facts | ({} if self.exact is None else distance(frames, self.exact)),
        )
        if self.options.encode:
            facts = self.timed_on_video(
                lambda video: peer.encode(video.bfloat16(), return_dict=False)
            )
            self.note("diffusers encode, bfloat16", facts)
        torch.backends.cudnn.benchmark = False


@torch.no_grad()
def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["832x480x81", "1280x720x81"], help="WIDTHxHEIGHTxFRAMES"
    )
    parser.add_argument("--vae", default="2.1", choices=DIMS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument(
        "--at-once", nargs="*", type=int, default=[1], help="latent frames decoded at once"
    )
    parser.add_argument("--tiles", nargs="*", type=int, default=[])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--suffix", default="", help="of the result's name")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = select_local_device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the others are compared with
    record = Record(
        options.out / f"vae-{options.vae}-{num_ranks}gpu{options.suffix}.json", ["size", "way"]
    )

    def save(row: dict[str, object]) -> None:
        print(row, flush=True)
        record.add(row)

    with open_process_groups(Degrees(ulysses=num_ranks), device, timeout_seconds=300) as groups:
        for size in options.sizes:
            width, height, frames = (int(number) for number in re.split("[*x]", size))
            bench = Bench(options.vae, (width, height, frames), groups.replica, options, save)
            for dtype in options.dtypes:
                bench.ours(dtype)
                torch.cuda.empty_cache()
            if options.peer and num_ranks == 1:
                bench.peer()
            del bench
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
