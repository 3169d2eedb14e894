"""Where a GGUF file's weights stay compressed, by the memory that there is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file

from launch import __main__ as launch
from wan_dist.planning.gguf_memory import (
    DECODING_BYTES,
    count_compressed_blocks,
    read_compressed_blocks,
)
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.parameter_bytes import count_all_blocks_bytes, count_block_bytes
from wan_dist.planning.plan import RunPlan, make_plan, plan_memory
from wan_dist.planning.residency import can_keep_models
from wan_dist.planning.workload import CompressedBlocks
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

GIB = 2**30
DIMS = get_task("t2v-14B").model_dims.transformer
Q4_K_M = CompressedBlocks(
    block_bytes=200 * 2**20,  # the transformer's part of 9.65 GB
    all_bytes=40 * 200 * 2**20,
    decoded_bytes=count_block_bytes(DIMS, 2),
    num_weights=320,
)


def plan_on(
    gpu_gib: float | None,
    host_gib: float,
    *settings: str,
    compressed: CompressedBlocks | None = Q4_K_M,
    ranks: tuple[int, int] = (1, 1),
) -> RunPlan:
    config = read_config(["task=t2v-14B", "size=832x480", "prompt=a cat", *settings])
    assert config is not None
    gpu_bytes = None if gpu_gib is None else int(gpu_gib * GIB)
    return plan_memory(
        make_plan(config, ranks=ranks),
        Hardware(gpu_bytes, int(host_gib * GIB)),
        get_task("t2v-14B").model_dims,
        compressed_blocks=compressed,
    )


@pytest.mark.parametrize(
    ("gpu_gib", "host_gib", "settings", "dit", "gguf"),
    [
        (80, 64, "", "resident", "decoded"),
        (32, 64, "", "resident", "decoded"),
        (24, 64, "", "resident", "compressed"),
        (16, 64, "", "resident", "compressed"),
        (8, 64, "", "stream", "decoded"),
        (8, 20, "", "stream", "compressed"),  # the host has no room for 22 GiB
        (8, 7, "", "disk", "compressed"),
        (80, 64, "memory.gguf=compressed", "resident", "compressed"),
        (24, 64, "memory.gguf=decoded", "stream", "decoded"),
        (24, 20, "memory.gguf=decoded", "disk", "decoded"),
        (24, 64, "memory.dit=stream", "stream", "decoded"),
        (24, 20, "memory.dit=stream", "stream", "compressed"),
        (24, 64, "memory.dit=disk", "disk", "compressed"),
        (None, 20, "", "resident", "compressed"),
        (24, 64, "quant=int8", "resident", "decoded"),
    ],
)
def test_the_fastest_that_fits(
    gpu_gib: float | None, host_gib: float, settings: str, dit: str, gguf: str
) -> None:
    plan = plan_on(gpu_gib, host_gib, *settings.split())
    assert (plan.arrangement.dit, plan.arrangement.gguf) == (dit, gguf)
    assert (" compressed" in plan.arrangement.description) == (gguf == "compressed")


def test_nothing_else_is_compressed() -> None:
    assert plan_on(24, 64, compressed=None).arrangement.gguf == "decoded"


@pytest.mark.parametrize(
    ("host_gib", "dit", "gguf"), [(64, "stream", "decoded"), (20, "resident", "compressed")]
)
def test_loras_are_merged_once_where_the_host_has_room(
    host_gib: float, dit: str, gguf: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    pair = {"x.lora_A.weight": torch.zeros(64, 13824), "x.lora_B.weight": torch.zeros(5120, 64)}
    save_file(pair, file)
    compressed = replace(Q4_K_M, num_changed=320)
    plan = plan_on(24, host_gib, f"lora={file}", compressed=compressed)
    assert (plan.arrangement.dit, plan.arrangement.gguf) == (dit, gguf)
    (denoise,) = (stage for stage in plan.stage_memories if stage.name == "denoise")
    assert plan.workload.merging_bytes > 0
    if gguf == "decoded":
        assert denoise.gpu_parts["loras"] == 3 * plan.workload.merging_bytes
    else:
        workspace = compressed.decoded_bytes + DECODING_BYTES + plan.workload.merging_bytes
        assert denoise.gpu_parts["workspace"] == workspace


def test_shards_stay_compressed_where_decoded_ones_have_no_room() -> None:
    settings = ("fsdp.dit=true", "parallel.ulysses=2")
    plans = [plan_on(gib, 64, *settings, ranks=(2, 2)) for gib in (24, 16)]
    assert [plan.arrangement.gguf for plan in plans] == ["decoded", "compressed"]
    assert all(plan.arrangement.shard_dit for plan in plans)
    (denoise,) = (stage for stage in plans[1].stage_memories if stage.name == "denoise")
    assert denoise.gpu_parts["gathered"] == 2 * Q4_K_M.block_bytes


@pytest.mark.parametrize("dit", ["resident", "stream", "disk"])
def test_what_is_counted(dit: str) -> None:
    decoded, compressed = (
        {
            stage.name: stage
            for stage in plan_on(80, 256, f"memory.dit={dit}", f"memory.gguf={gguf}").stage_memories
        }
        for gguf in ("decoded", "compressed")
    )
    block_bytes, all_bytes = count_block_bytes(DIMS, 2), count_all_blocks_bytes(DIMS, 2, "none")
    saved_bytes = (
        all_bytes - Q4_K_M.all_bytes
        if dit == "resident"
        else 2 * (block_bytes - Q4_K_M.block_bytes)
    )
    for name in ("load", "denoise"):
        weights = [stages[name].gpu_parts["weights"] for stages in (decoded, compressed)]
        assert weights[0] - weights[1] == saved_bytes
    workspace = compressed["denoise"].gpu_parts["workspace"]
    assert workspace == Q4_K_M.decoded_bytes + DECODING_BYTES
    assert "workspace" not in decoded["denoise"].gpu_parts
    host_bytes = [stages["denoise"].host_bytes for stages in (decoded, compressed)]
    saved_on_host = {
        "resident": 0,
        "stream": all_bytes - Q4_K_M.all_bytes,
        "disk": 3 * (block_bytes - Q4_K_M.block_bytes),
    }
    assert host_bytes[0] - host_bytes[1] == saved_on_host[dit]
    assert compressed["context"] == decoded["context"]


def test_compressed_models_stay_between_videos() -> None:
    assert can_keep_models(plan_on(24, 64))


@pytest.mark.parametrize(
    ("gpu_gib", "settings", "num_changed", "note"),
    [
        (24, "", 0, "weights stay in the file's blocks, 7.8 GiB instead of 22.3 (decoded ones have no room)"),
        (80, "", 0, "weights are decoded as they are read (there is room)"),
        (
            80,
            "memory.dit=disk",
            0,
            "weights stay in the file's blocks, 7.8 GiB instead of 22.3 (they are read at each step)",
        ),
        (80, "memory.gguf=decoded", 0, "weights are decoded as they are read (memory.gguf=decoded)"),
        (
            80,
            "memory.gguf=compressed",
            8,
            "weights stay in the file's blocks, 7.8 GiB instead of 22.3 (memory.gguf=compressed); "
            "LoRAs are merged into 8 of 320 again in each step",
        ),
    ],
)  # fmt: skip
def test_a_line_says_what_was_chosen_and_why(
    gpu_gib: float, settings: str, num_changed: int, note: str
) -> None:
    compressed = replace(Q4_K_M, num_changed=num_changed)
    assert plan_on(gpu_gib, 64, *settings.split(), compressed=compressed).gguf_note == note
    assert not plan_on(gpu_gib, 64, *settings.split(), compressed=None).gguf_note


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"quant=fp8 and memory\.gguf=compressed cannot be combined"
    ):
        plan_on(80, 64, "quant=fp8", "memory.gguf=compressed")
    with pytest.raises(
        InputError, match=r"; without memory.dit=resident memory.gguf=decoded it fits"
    ):
        plan_on(16, 64, "memory.gguf=decoded", "memory.dit=resident")


NAMES = {
    "original": "self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.o ffn.0 ffn.2 "
    "cross_attn.k cross_attn.v_img",
    "diffusers": "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_out.0 "
    "ffn.net.0.proj ffn.net.2 attn2.to_k attn2.add_v_proj",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", NAMES)
def test_a_plan_reads_the_header_of_the_file(
    layout: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a checkpoint that is opened, and without torch: a file of zeros in Q4_0."""
    dims = get_task("t2v-1.3B").model_dims.transformer
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "wan")
    for block in range(dims.num_layers):
        for index, name in enumerate(NAMES[layout].split()):
            shape = {6: (dims.ffn_dim, dims.dim), 7: (dims.dim, dims.ffn_dim)}.get(
                index, (dims.dim, dims.dim)
            )
            writer.add_tensor_info(
                f"{prefix}blocks.{block}.{name}.weight",
                (shape[0], shape[1] // 32 * 18),
                np.dtype(np.uint8),
                shape[0] * shape[1] // 32 * 18,
                raw_dtype=GGMLQuantizationType.Q4_0,
            )
    writer.add_tensor_info(
        f"{prefix}blocks.0.norm3.weight", (dims.dim,), np.dtype(np.float32), dims.dim * 4
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    blocks = read_compressed_blocks([path], dims, 2, has_loras=True)
    num_values = (6 * dims.dim + 2 * dims.ffn_dim) * dims.dim
    block_bytes = count_block_bytes(dims, 2) - num_values * 2 + num_values // 32 * 18
    assert blocks == CompressedBlocks(
        block_bytes=block_bytes,
        all_bytes=dims.num_layers * block_bytes,
        decoded_bytes=2 * num_values,
        num_weights=8 * dims.num_layers,
        num_changed=8 * dims.num_layers,
    )
    arguments = ["task=t2v-1.3B", "gpus=6GB", "host=16GB", f"dit_file={path}"]
    launch.main(["plan", *arguments, "memory.gguf=compressed"])
    told = capsys.readouterr().out
    assert "transformer resident compressed; " in told
    assert "weights stay in the file's blocks, 0.7 GiB instead of 2.3 (memory.gguf=comp" in told
    launch.main(["plan", *arguments, "quant=int8"])
    assert "blocks" not in capsys.readouterr().out


def test_files_that_are_of_no_use_are_left_to_the_run(tmp_path: Path) -> None:
    dims = get_task("t2v-1.3B").model_dims.transformer
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0")
    (tmp_path / "empty.gguf").touch()
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    for name in ("cut.gguf", "empty.gguf", "a.safetensors", "gone.gguf"):
        assert read_compressed_blocks([tmp_path / name], dims, 2, has_loras=False) is None


def test_the_larger_of_two_experts_counts() -> None:
    dims = get_task("t2v-1.3B").model_dims.transformer
    names = [f"blocks.{block}.ffn.0.weight" for block in range(dims.num_layers)]
    shape = (dims.ffn_dim, dims.dim)
    small, large = (dict.fromkeys(names, (shape, kind)) for kind in ("Q4_0", "Q8_0"))
    sizes = [count_compressed_blocks([one], dims, 2, 0) for one in (small, large)]
    both = count_compressed_blocks([small, large], dims, 2, 0)
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[0].all_bytes < sizes[1].all_bytes
    assert both == replace(sizes[1], num_weights=2 * dims.num_layers)
    wide = dict.fromkeys(names, ((10 * dims.ffn_dim, 10 * dims.dim), "Q4_0"))
    assert count_compressed_blocks([wide], dims, 2, 0) is None


def test_blocks_of_a_side_branch_count() -> None:
    """Bytes of all blocks of VACE, and one decoded block with both of its projections."""
    dims = get_task("vace-1.3B").model_dims.transformer
    width, ffn = dims.dim, dims.ffn_dim
    tensors = {}
    for block in dims.block_names:
        tensors[f"{block}.self_attn.q.weight"] = ((width, width), "Q8_0")
        tensors[f"{block}.cross_attn.k.weight"] = ((width, width), "Q8_0")
        if block.startswith("vace"):
            tensors[f"{block}.after_proj.weight"] = ((width, width), "Q8_0")
    found = count_compressed_blocks([tensors], dims, 2, 0)
    assert found is not None
    num_saved = len(dims.block_names) + len(dims.vace_layers)
    saved_bytes = num_saved * width * (width * 2 - width // 32 * 34)
    assert found.all_bytes == count_all_blocks_bytes(dims, 2, "none") - saved_bytes
    assert found.num_weights == num_saved
    assert found.decoded_bytes == (8 * width + 2 * ffn) * width * 2


def test_layers_that_add_audio_count_with_their_block() -> None:
    dims = get_task("s2v-14B").model_dims.transformer
    d = dims.dim
    names = [f"blocks.{index}.self_attn.q.weight" for index in range(dims.num_layers)]
    injections = [
        f"audio_injector.injector.{index}.{part}.weight"
        for index in range(len(dims.audio_layers))
        for part in "qo"
    ]
    others = [f"audio_injector.injector.{index}.k.weight" for index in range(12)]  # not in a block
    counted = [
        count_compressed_blocks([dict.fromkeys(keys, ((d, d), "Q8_0"))], dims, 2, 0)
        for keys in (names, names + others, names + injections)
    ]
    assert counted[0] is not None
    assert counted[1] == counted[0]
    assert counted[2] is not None
    assert counted[2].num_weights == dims.num_layers + 24
    saved_bytes = d * d * 2 - d * d // 32 * 34
    assert counted[0].all_bytes - counted[2].all_bytes == 24 * saved_bytes
    assert counted[0].decoded_bytes == (8 * d + 2 * dims.ffn_dim) * d * 2
