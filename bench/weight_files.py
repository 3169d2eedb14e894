"""Load time, peak memory and step time of a transformer from each kind of weight file, and with LoRAs.

    python bench/checkpoint.py --task i2v-14B CHECKPOINTS/i2v-14B
    python -m bench.weight_files CHECKPOINTS --task i2v-14B --files FOLDER size=832x480

The files are made of the checkpoint's transformer: fp8 with a scale for each tensor, and GGUF of Q8_0 and of
Q4_K_M, whose values are drawn anew (its blocks are random). Each row is a run in a process of its own, with
weights in the page cache. Prints a table; writes bench/results/weight-files-TASK.json.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.memory import noise_image, timed_run
from bench.record import Record, this_run
from wan_dist.models.kernels.gguf_blocks import BLOCK_FORMATS
from wan_dist.tasks.registry import TASKS

_LORA_RANK = 64
_GGUF_TYPES = {"F32": 0, "BF16": 30, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}
_FILE_NAMES = {"fp8": "fp8.safetensors", "Q8_0": "Q8_0.gguf", "Q4_K_M": "Q4_K_M.gguf"}
_LORAS = "lora=FILES/lora-1.safetensors,FILES/lora-2.safetensors"
ROWS = {
    "bf16": "",
    "bf16, two LoRAs": _LORAS,
    "fp8": "dit_file=FILES/fp8.safetensors quant=fp8",
    "fp8, two LoRAs": f"dit_file=FILES/fp8.safetensors quant=fp8 {_LORAS}",
    "bf16, computed in fp8": "quant=fp8",
    "bf16, two LoRAs, computed in fp8": f"quant=fp8 {_LORAS}",
    "Q8_0": "dit_file=FILES/Q8_0.gguf",
    "Q8_0, two LoRAs": f"dit_file=FILES/Q8_0.gguf {_LORAS}",
    "Q4_K_M": "dit_file=FILES/Q4_K_M.gguf",
    "Q4_K_M, computed in fp8": "dit_file=FILES/Q4_K_M.gguf quant=fp8",
    "Q4_K_M, two LoRAs, computed in int4": f"dit_file=FILES/Q4_K_M.gguf quant=int4 {_LORAS}",
}


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the weight of a linear of a block, which files quantise and LoRAs change."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def write_fp8_file(tensors: Iterable[tuple[str, Tensor]], file: Path) -> None:
    """Write a file as ComfyUI's: e4m3 values, and a scale for each tensor."""
    stored = {}
    for name, tensor in tensors:
        if not is_linear(name, tuple(tensor.shape)):
            stored[name] = tensor.cpu()
            continue
        scale = tensor.abs().max().float() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn).cpu()
        stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1).cpu()
    stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(stored, file)


def write_loras(shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Write two LoRAs of rank 64 over all linears of the blocks, bfloat16, small against the weights."""
    for number in (1, 2):
        torch.manual_seed(number)
        tensors = {}
        for name, shape in shapes.items():
            if is_linear(name, shape):
                stem = "diffusion_model." + name.removesuffix(".weight")
                for part, size in (
                    ("lora_A", (_LORA_RANK, shape[1])),
                    ("lora_B", (shape[0], _LORA_RANK)),
                ):
                    tensors[f"{stem}.{part}.weight"] = 0.01 * torch.randn(
                        size, dtype=torch.bfloat16
                    )
        save_file(tensors, folder / f"lora-{number}.safetensors")


def choose_gguf_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the type of a tensor in a file of this kind; Q4_K_M keeps some of the linears in Q6_K."""
    if not is_linear(name, shape):
        return "F32"
    if kind == "Q8_0":
        return kind
    is_sensitive = name.split(".", 2)[2] in ("self_attn.v.weight", "ffn.2.weight")
    return "Q6_K" if is_sensitive and int(name.split(".")[1]) % 2 else "Q4_K"


def encode_random_blocks(shape: tuple[int, ...], type_name: str, device: str) -> Tensor:
    """Return the bytes of random blocks, (rows, bytes); values have a standard deviation near in**-0.5."""
    block = BLOCK_FORMATS[type_name]
    num_blocks = prod(shape) // block.num_values
    data = torch.randint(256, (num_blocks, block.num_bytes), dtype=torch.uint8, device=device)
    wanted = shape[1] ** -0.5

    def half(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float16, device=device).view(torch.uint8)

    if type_name == "Q8_0":  # values are d * q, q uniform in -128 to 127
        data[:, :2] = half(wanted / 74)
    elif type_name == "Q6_K":  # d * scale (8 bits) * (q - 32)
        data[:, -2:] = half(wanted / (74 * 18.5))
    else:  # d * scale * q - dmin * min, both of 6 bits, q of 4
        data[:, :2] = half(wanted / 160)
        data[:, 2:4] = half(wanted / 160 * 7.5)
    return data.reshape(shape[0], -1)


def write_gguf_file(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    file: Path,
    kind: str,
    device: str,
) -> None:
    """Write a GGUF file, version 3; tensors begin at multiples of 32 bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    types = {name: choose_gguf_type(name, shape, kind) for name, shape in shapes.items()}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1)
    header += text("general.architecture") + struct.pack("<I", 8) + text("wan")
    offset = 0
    for name, shape in shapes.items():
        header += text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", _GGUF_TYPES[types[name]], offset)
        block = BLOCK_FORMATS.get(types[name])
        num_bytes = prod(shape) * 4
        if block is not None:
            num_bytes = prod(shape) // block.num_values * block.num_bytes
        offset += -(-num_bytes // 32) * 32
    with file.open("wb") as stream:
        stream.write(header.ljust(-(-len(header) // 32) * 32, b"\0"))
        for name, tensor in tensors:
            if types[name] == "F32":
                data = tensor.float().reshape(-1).view(torch.uint8)
            else:
                data = encode_random_blocks(shapes[name], types[name], device).reshape(-1)
            stream.write(data.cpu().numpy().data)
            stream.write(b"\0" * (-data.numel() % 32))


def make_files(weights: Path, folder: Path) -> None:
    """Write the files that are missing, of the tensors of a safetensors file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(weights, "pt", device=device) as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

        def read() -> Iterator[tuple[str, Tensor]]:
            return ((name, opened.get_tensor(name)) for name in shapes)

        if not (folder / "lora-2.safetensors").exists():
            write_loras(shapes, folder)
        if not (file := folder / _FILE_NAMES["fp8"]).exists():
            write_fp8_file(read(), file)
        for kind in ("Q8_0", "Q4_K_M"):
            if not (file := folder / _FILE_NAMES[kind]).exists():
                write_gguf_file(read(), shapes, file, kind, device)


def run_row(options: argparse.Namespace) -> None:
    """Run one row in this process; writes what it took to ``result.json`` in the work folder."""
    image = noise_image((832, 480), options.work)
    settings = [
        f"task={options.task}",
        f"ckpt_dir={options.checkpoints / options.task}",
        "prompt=two cats boxing on a stage",
        "sample.steps=3",
        "sample.guide_scale=1",
        *([f"image={image}"] if TASKS[options.task].inputs.is_required else []),
        *ROWS[options.row].replace("FILES", str(options.files)).split(),
        *options.settings,
    ]
    code, seconds, record = timed_run(settings, options.work)
    if code or record is None:
        raise SystemExit(code or 1)
    stages = record.to_json()["stages"]
    memory = record.to_json()["memory"]
    found = {"step_seconds": seconds, "stages": stages, "memory": memory}
    (options.work / "result.json").write_text(json.dumps(found))


def measure_row(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Run a row in a process of its own; returns what it took, or its exit code."""
    result = options.work / "result.json"
    result.unlink(missing_ok=True)
    given = [str(options.checkpoints), *options.settings, "--task", options.task, "--row", name]
    given += ["--files", str(options.files), "--work", str(options.work)]
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    with (options.work / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "bench.weight_files", *given],
            env=environment,
            stderr=log,
            stdout=log,
            timeout=options.timeout,
        )
    row = json.loads(result.read_text()) if result.exists() else {"code": done.returncode}
    return {"what": name, **row}


def describe_row(row: dict[str, object]) -> str:
    """Return a line: seconds and GB/s of loading, peaks of loading and of the run, seconds a step."""
    stages, memory = row.get("stages"), row.get("memory")
    if not isinstance(stages, dict) or not isinstance(memory, dict):
        return f"  {row['what']:38} failed: {row}"
    load, peak = stages["load"], memory["denoise"]
    steps = row["step_seconds"]
    assert isinstance(steps, list)
    return (
        f"  {row['what']:38} load {load['seconds']:6.2f} s  peak {peak.get('peak_gpu_gib', 0):6.2f} GiB "
        f"(planned {peak['planned_gpu_gib']:6.2f})  {min(steps[1:]):6.3f} s/it"
    )


def main() -> None:
    """Make the files, measure the rows and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, help="a folder with a checkpoint for the task")
    parser.add_argument("settings", nargs="*", help="more settings of the runs")
    parser.add_argument("--task", default="i2v-14B", choices=TASKS)
    parser.add_argument("--files", type=Path, default=Path("/dev/shm/wan-dist-files"))
    parser.add_argument("--row", choices=ROWS, help="measure this one in this process")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--timeout", type=float, default=150, help="seconds for a row")
    parser.add_argument("--work", type=Path, default=Path("/tmp/wan-dist-weight-files"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_intermixed_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.row is not None:
        run_row(options)
        return
    (weights,) = (options.checkpoints / options.task).glob("diffusion_pytorch_model*.safetensors")
    make_files(weights, options.files)
    record = Record(options.out / f"weight-files-{options.task}.json", ["what"])
    print(f"{options.task} {' '.join(options.settings)} on {this_run()['gpu']}", flush=True)
    for name in options.rows:
        try:
            row = measure_row(name, options)
        except subprocess.TimeoutExpired:
            row = {"what": name, "code": f"longer than {options.timeout:g} s"}
        print(describe_row(row), flush=True)
        record.add(row)


if __name__ == "__main__":
    main()
