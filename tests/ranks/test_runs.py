"""Whole runs on several ranks (gloo, CPU) against the reference implementation's videos, at one
rank's tolerance.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, golden_folder, has_golden
from tests.ranks.tables import run_workers
from tests.test_command import reference_arguments
from tests.test_fun import list_settings as list_fun_settings
from tests.unit.weights.test_lora_merging import make_lora
from tests.weight_files import make_comfyui_folder


@dataclass(frozen=True)
class Case:
    """One run: which golden, and how it is spread."""

    task: str
    golden: str
    case: str
    spread: str

    @property
    def name(self) -> str:
        return f"{self.task}-{self.case}-{self.spread.replace(' ', '-').replace('parallel.', '')}"


T2V, ODD = ("t2v-1.3B", "wan2.1-t2v", "unipc"), ("t2v-1.3B", "wan2.1-t2v", "odd")
I2V, A14B, TI2V = (
    ("i2v-14B", "wan2.1-i2v", "unipc"),
    ("t2v-A14B", "wan2.2-t2v-a14b", "unipc"),
    ("ti2v-5B", "wan2.2-ti2v-5b", "i2v"),
)
CONTROL = ("fun-control-A14B", "wan-fun/control-a14b", "ref")
CAMERA = ("fun-camera-A14B", "wan-fun/camera-a14b", "start")
VACE = ("vace-14B", "wan2.1-vace-files", "video_ref")
ANIMATE, GUIDED = (("animate-14B", "wan2.2-animate", case) for case in ("replace", "guided"))
SPEECH, POSES = (("s2v-14B", "wan2.2-s2v", case) for case in ("unipc", "pose"))
FLF2V, I2V_A14B = ("flf2v-14B", "wan2.1-flf2v", "unipc"), ("i2v-A14B", "wan2.2-i2v-a14b", "unipc")

# The models have 4 heads; token counts are 45 (t2v), 84 (odd), 72 (i2v), 84 (flf2v), 54 (i2v-A14B) and
# 36 (ti2v). Those of VACE are 140, of Animate 48 in 4 latent frames and 72 in 6 (guided). Those of a
# clip of speech are 48 and 72, of which 32 are noisy, and 96 and 144 (pose).
CASES = {
    2: [
        Case(*T2V, "parallel.ulysses=2"),
        Case(*T2V, "parallel.ring=2"),
        Case(*T2V, "parallel.cfg=2"),
        Case(*T2V, "parallel.ulysses=2 fsdp.dit=true fsdp.t5=true"),
        Case(*T2V, ""),
        Case(*ODD, "parallel.cfg=2 fsdp.dit=true"),
        Case(*I2V, "parallel.ulysses=2"),
        Case(*I2V, "parallel.cfg=2 fsdp.dit=true"),
        Case(*A14B, "parallel.cfg=2 fsdp.dit=true"),
        Case(*A14B, "parallel.ring=2"),
        Case(*TI2V, "parallel.ulysses=2"),
        Case(*TI2V, "parallel.ring=2 fsdp.dit=true"),
        Case(*I2V, "parallel.ulysses=2 memory.dit=disk memory.t5=stream memory.slice_tokens=7"),
        Case(*A14B, "parallel.cfg=2 memory.dit=stream"),
        Case(*VACE, "parallel.ulysses=2 memory.dit=disk memory.slice_tokens=31"),
        Case(*VACE, "parallel.cfg=2 fsdp.dit=true"),
        Case(*CAMERA, "parallel.ulysses=2 fsdp.dit=true"),
        Case(*GUIDED, "parallel.cfg=2 fsdp.dit=true"),
        Case(*SPEECH, "parallel.cfg=2 fsdp.dit=true"),
        Case(*POSES, "parallel.ulysses=2"),
    ],
    3: [
        Case(*T2V, ""),
        Case(*I2V, "parallel.ring=3 fsdp.dit=true fsdp.t5=true"),
        Case(*TI2V, "parallel.ring=3"),
        Case(*VACE, "parallel.ring=3 memory.dit=stream"),
        Case(*CONTROL, "parallel.ring=3 memory.dit=disk memory.slice_tokens=5"),
        Case(*ANIMATE, "parallel.ring=3 memory.dit=stream"),
        Case(*SPEECH, "parallel.ring=3 memory.dit=disk memory.slice_tokens=5"),
    ],
    4: [
        Case(*T2V, ""),
        Case(*T2V, "parallel.ulysses=4"),
        Case(*T2V, "parallel.ring=4"),
        Case(*T2V, "parallel.ring=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*ODD, "parallel.cfg=2 parallel.ring=2"),
        Case(*I2V, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*I2V_A14B, "parallel.ring=2 parallel.ulysses=2 fsdp.dit=true fsdp.t5=true"),
        Case(*A14B, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*TI2V, "parallel.ring=2 parallel.ulysses=2"),
        Case(*TI2V, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*FLF2V, "parallel.ulysses=4"),
        Case(*VACE, "parallel.ring=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*CONTROL, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*GUIDED, "parallel.ring=2 parallel.ulysses=2 memory.slice_tokens=5"),
        Case(*SPEECH, "parallel.ulysses=4"),
        Case(*POSES, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
    ],
}


@dataclass(frozen=True)
class Run:
    """One run of the command on some ranks."""

    num_ranks: int
    arguments: list[str]


def run_all(runs: Mapping[str, Run], folder: Path) -> None:
    """Do runs one after the other, on the same processes; fails, with what all have printed, if one fails.

    Those on the most ranks come first: ranks count their runs, and must agree on the number.
    """
    names = sorted(runs, key=lambda name: -runs[name].num_ranks)
    most_ranks = runs[names[0]].num_ranks
    table: list[list[object]] = [[runs[name].num_ranks, runs[name].arguments] for name in names]
    told = run_workers("tests.ranks.worker", table, most_ranks, folder)
    codes_by_rank = [
        json.loads((folder / f"codes-{rank}.json").read_text()) for rank in range(most_ranks)
    ]
    codes = dict(zip(names, zip(*codes_by_rank, strict=True), strict=True))
    assert codes == {
        name: (0,) * run.num_ranks + (None,) * (most_ranks - run.num_ranks)
        for name, run in runs.items()
    }, told


def test_any_spread_gives_the_reference_implementations_video(tmp_path: Path) -> None:
    cases = {
        f"{num_ranks}-{case.name}": (num_ranks, case)
        for num_ranks, table in CASES.items()
        for case in table
        if has_golden(case.golden)
    }
    runs = {}
    for name, (num_ranks, case) in cases.items():
        # a text is encoded once by each number of ranks, and where its encoder is sharded or streamed
        cache = "null" if "t5=" in case.spread else tmp_path / f"prompts-{num_ranks}"
        list_arguments = list_fun_settings if "fun" in case.task else reference_arguments
        arguments = [
            *list_arguments(golden_folder(case.golden), case.case, case.task),
            *case.spread.split(),
            "dtype=float32",
            "device=cpu",
            f"cache.dir={cache}",
            f"output.dir={tmp_path / name}",
        ]
        runs[name] = Run(num_ranks, arguments)
    run_all(runs, tmp_path)
    errors = {}
    for name, (_, case) in cases.items():
        video = load_file(tmp_path / name / "out.safetensors")["video"]
        expected = load_file(golden_folder(case.golden) / f"expected/{case.case}.safetensors")[
            "video"
        ]
        errors[name] = (video - expected).abs().max().item()
        assert (tmp_path / name / "out.mp4").exists()
    print(json.dumps(errors, indent=2))
    assert not torch.tensor(list(errors.values())).isnan().any()
    assert max(errors.values()) < 1e-3


def test_weights_of_any_kind_are_the_same_on_any_ranks(tmp_path: Path) -> None:
    """Quantised ones, and those of ComfyUI's files, also against a checkpoint of the same values, and
    those with a LoRA against a file with its weights.
    """
    spreads = {
        f"{kind}{suffix}": (num_ranks, [f"quant={kind}", *spread.split()])
        for kind in ("fp8", "int8", "int4")
        for suffix, num_ranks, spread in (
            ("", 2, "fsdp.dit=true parallel.ulysses=2"),
            ("-alone", 1, ""),
        )
    }
    spreads["streamed"] = (2, ["quant=int4", "memory.dit=stream", "parallel.ring=2"])
    expected = {name: name.removesuffix("-alone") + "-alone" for name in spreads}
    expected["streamed"] = "int4-alone"
    for kind in ("gguf", "scaled"):
        models, plain = make_comfyui_folder(tmp_path / f"files-{kind}", is_gguf=kind == "gguf")
        spreads |= {
            f"{kind}-plain": (1, [f"ckpt_dir={plain}", "cache.dir=null"]),
            f"{kind}-alone": (1, [f"ckpt_dir={models}", "cache.dir=null"]),
            f"{kind}-sharded": (
                2,
                [
                    f"ckpt_dir={models}",
                    "cache.dir=null",
                    "fsdp.dit=true",
                    "fsdp.t5=true",
                    "parallel.ulysses=2",
                ],
            ),
            f"{kind}-disk": (
                2,
                [
                    f"ckpt_dir={models}",
                    "cache.dir=null",
                    "memory.dit=disk",
                    "memory.t5=stream",
                    "parallel.cfg=2",
                ],
            ),
        }
        names = ("alone", "sharded", "disk")
        expected |= {f"{kind}-{name}": f"{kind}-plain" for name in names}
    lora, merged = make_lora(1)
    lora_file, merged_file = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    save_file(lora, lora_file)
    save_file({key: value.float() for key, value in merged.items()}, merged_file)
    with_lora = [f"lora={lora_file}", "lora_strength=0.5"]
    spreads |= {
        "lora-merged": (1, [f"dit_file={merged_file}"]),
        "lora-sharded": (2, [*with_lora, "fsdp.dit=true", "parallel.ulysses=2"]),
        "lora-streamed": (2, [*with_lora, "memory.dit=disk", "parallel.cfg=2"]),
    }
    expected |= dict.fromkeys(("lora-sharded", "lora-streamed"), "lora-merged")
    arguments = reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B")
    always = [*arguments, "dtype=float32", "device=cpu"]
    runs = {
        name: Run(num_ranks, [*always, *spread, f"output.dir={tmp_path / name}"])
        for name, (num_ranks, spread) in spreads.items()
    }
    run_all(runs, tmp_path)

    def video(folder: str) -> torch.Tensor:
        return load_file(tmp_path / folder / "out.safetensors")["video"]

    for name, reference in expected.items():
        torch.testing.assert_close(video(name), video(reference), rtol=0, atol=1e-3)
    whole = load_file(FIXTURES / "wan2.1-t2v/expected/unipc.safetensors")["video"]
    for kind in ("gguf", "scaled"):  # the files' rounding is seen, so the files were read
        assert 0.02 < (video(f"{kind}-alone") - whole).abs().max() < 1
    assert (video("lora-merged") - whole).abs().mean() > 0.05


def test_gguf_stays_compressed_on_any_ranks(tmp_path: Path) -> None:
    """And gives what decoded weights give, bit for bit, however the weights are kept."""
    models, _ = make_comfyui_folder(tmp_path / "files", is_gguf=True)
    splits = {
        "alone": (1, ""),
        "ulysses": (2, "parallel.ulysses=2"),
        "ring": (2, "parallel.ring=2"),
        "cfg": (2, "parallel.cfg=2"),
        "both": (4, "parallel.ring=2 parallel.ulysses=2"),
        "lora": (2, f"parallel.cfg=2 lora={tmp_path / 'lora.safetensors'} lora_strength=0.5"),
    }
    save_file(make_lora(1)[0], tmp_path / "lora.safetensors")
    kept = {
        "alone": ("memory.dit=resident", "memory.dit=stream", "memory.slice_tokens=7"),
        "ulysses": ("fsdp.dit=true", "memory.dit=resident"),
        "ring": ("memory.dit=stream",),
        "cfg": ("memory.dit=disk", "fsdp.dit=true"),
        "both": ("fsdp.dit=true",),
        "lora": ("fsdp.dit=true", "memory.dit=stream", "memory.dit=disk"),
    }
    arguments = [
        *reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B"),
        f"ckpt_dir={models}",
        *("dtype=bfloat16", "device=cpu", "sample.steps=2", f"cache.dir={tmp_path / 'prompts'}"),
    ]
    runs = {}
    for split, (num_ranks, degrees) in splits.items():
        spreads = {f"{split}-decoded": "memory.gguf=decoded"}
        for index, placement in enumerate(kept[split]):
            spreads[f"{split}-{index}"] = f"memory.gguf=compressed {placement}"
        for name, spread in spreads.items():
            settings = [*degrees.split(), *spread.split(), f"output.dir={tmp_path / name}"]
            runs[name] = Run(num_ranks, [*arguments, *settings])
    run_all(runs, tmp_path)

    def read_result(name: str) -> dict[str, torch.Tensor]:
        (latents_file,) = (tmp_path / name).glob("*.latents.safetensors")
        return load_file(latents_file) | load_file(tmp_path / name / "out.safetensors")

    for name in runs:
        result, expected = (
            read_result(folder) for folder in (name, f"{name.partition('-')[0]}-decoded")
        )
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(result[key], value), (name, key)
    videos = [read_result(f"{name}-decoded")["video"] for name in ("cfg", "lora")]
    assert (videos[0] - videos[1]).abs().mean() > 0.01  # the LoRA is seen
