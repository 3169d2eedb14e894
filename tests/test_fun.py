"""The Fun models against their makers' pipelines: what is read from files, and whole runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import golden_folder, relative_error
from tests.gallery_folder import check_source
from tests.unit.tasks.test_vace import make_video
from wan_dist.models.control import compute_rays, stack_rays
from wan_dist.pipeline.conditioning.fun import iterate_control_frames
from wan_dist.planning.plan import make_plan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.run import main
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.camera import MOTIONS, read_camera
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.run_config import read_config
from wan_dist.weights.checkpoint import open_checkpoint

CASES = [
    ("fun-inp-A14B", "inp-a14b", "start_end"),
    ("fun-inp-A14B", "inp-a14b", "start_euler"),
    ("fun-inp-A14B", "inp-a14b", "text"),
    ("fun-control-A14B", "control-a14b", "ref"),
    ("fun-control-A14B", "control-a14b", "start_end"),
    ("fun-camera-A14B", "camera-a14b", "start"),
    ("fun-control-14B", "control-2.1-14b", "ref"),
    ("fun-control-14B", "control-2.1-14b", "start"),
    ("fun-inp-5B", "inp-5b", "start_end"),
]
INPUT_KEYS = {
    "start_image": "first_frame",
    "end_image": "last_frame",
    "ref_image": "src_ref_images",
    "control_video": "src_video",
    "camera": "camera",
}
SOLVERS = {"euler": "fun_euler", "dpmpp": "dpm++"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def list_settings(folder: Path, case: str, task: str) -> list[str]:
    """Return the arguments of a run of the makers' pipeline."""
    run = json.loads((folder / f"expected/{case}.json").read_text(encoding="utf-8"))
    files = [f"ckpt_dir={folder}"]
    if "checkpoint_parts" in run:
        parts = golden_folder(Path(run["checkpoint_parts"]).name)
        files = [f"ckpt_dir={parts}", f"dit_file={folder}/diffusion_pytorch_model.safetensors"]
    inputs = {ours: folder / run[theirs] for theirs, ours in INPUT_KEYS.items() if run.get(theirs)}
    if "2.1" in folder.name and "first_frame" in inputs:
        inputs["image"] = inputs.pop("first_frame")
    width, height = run["size"]
    return [
        *(f"task={task}", *files, f"prompt={run['prompt']}"),
        *(f"{key}={file}" for key, file in inputs.items()),
        f"negative_prompt={run['negative_prompt']}",
        *(f"size={width}x{height}", f"frame_num={run['frame_num']}", f"seed={run['seed']}"),
        *(f"sample.steps={run['steps']}", f"sample.shift={run['shift']}"),
        f"sample.solver={SOLVERS.get(run['solver'], run['solver'])}",
        f"sample.guide_scale={run['guide_scale']}",
        *("dtype=float32", "device=cpu", "cache.dir=null"),
        *("output.dir=out", "output.name=out", "output.save_tensor=true"),
    ]


def copy_checkpoint(golden: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Return a folder with a checkpoint's files, but with these weights of its transformer."""
    folder.mkdir()
    for path in golden.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def make_latents(*settings: str, name: str) -> torch.Tensor:
    assert main([*settings, f"output.name={name}"]) == 0
    return load_file(f"out/{name}.latents.safetensors")["latents"]


@pytest.mark.parametrize(("task", "name", "case"), CASES)
def test_the_video_is_the_makers(task: str, name: str, case: str) -> None:
    settings = list_settings(golden_folder(f"wan-fun/{name}"), case, task)
    expected = load_file(golden_folder(f"wan-fun/{name}") / f"expected/{case}.safetensors")
    assert main(settings) == 0
    latents = load_file("out/out.latents.safetensors")["latents"]
    error = relative_error(latents, expected["final_latent"])
    print(error)
    assert error < 1e-3
    if "video" in expected:
        video = load_file("out/out.safetensors")["video"]
        torch.testing.assert_close(video, expected["video"].clamp(-1, 1), rtol=0, atol=1e-3)
    check_source(Path("out"), settings)


def make_run_plan(*settings: str) -> VideoPlan:
    config = read_config(settings)
    assert config is not None
    return make_plan(config, ranks=(1, 1))


@pytest.mark.parametrize(("task", "name", "case"), [case for case in CASES if "control" in case[0]])
def test_frames_of_the_control_video_are_the_makers(task: str, name: str, case: str) -> None:
    """Exactly, though OpenCV resizes in fixed point."""
    plan = make_run_plan(*list_settings(golden_folder(f"wan-fun/{name}"), case, task))
    expected = load_file(golden_folder(f"wan-fun/{name}") / f"expected/{case}.safetensors")
    assert plan.source is not None
    frames = torch.stack(list(iterate_control_frames(plan.source)), dim=1)
    assert torch.equal(frames, expected["input.control_video"])


def test_rays_and_predictions_with_a_camera_are_the_makers() -> None:
    folder = golden_folder("wan-fun/camera-a14b")
    plan = make_run_plan(
        *list_settings(golden_folder("wan-fun/camera-a14b"), "start", "fun-camera-A14B")
    )
    golden = load_file(folder / "expected/start.safetensors")
    cameras, size = torch.tensor(plan.camera), (plan.height, plan.width)
    rays = compute_rays(cameras[-1:], size)[0]
    torch.testing.assert_close(rays, golden["input.plucker_last"], rtol=0, atol=1e-6)
    num_frames, *latent_size = golden["step0.latent"].shape[1:]
    stacked = torch.cat([stack_rays(cameras, index, size) for index in range(num_frames)])
    expected = golden["input.camera_every_4th"].transpose(0, 1)
    torch.testing.assert_close(stacked[:, :, ::4, ::4], expected, rtol=0, atol=1e-6)
    checkpoint = open_checkpoint(folder, TASKS["fun-camera-A14B"], torch.float32)
    rotary = None
    for step, expert in enumerate([0, 0, 1]):
        projection = checkpoint.context_projections[expert].load(torch.device("cpu"))
        model = checkpoint.transformers[expert].load(torch.device("cpu"))
        latents = torch.cat([golden[f"step{step}.latent"], golden["input.y"]]).unsqueeze(0)
        rotary = model.compute_rotary(latents) if rotary is None else rotary
        control = projection.embed_control(None, cameras, (num_frames, *latent_size))
        contexts = projection([golden["input.context"], golden["input.context_null"]])
        timesteps = golden["timesteps"][step].view(1, 1)
        outputs = model(latents, timesteps, contexts, rotary, control=control)
        for branch, velocity in zip(("cond", "uncond"), outputs, strict=True):
            assert relative_error(velocity[0], golden[f"step{step}.{branch}"]) < 1e-4


def test_motions_are_the_makers() -> None:
    """World-to-camera matrices of their files, inverted: the camera goes the other way."""
    moved = {name: read_camera(name, 5, (832, 480))[3] for name in MOTIONS}
    lens = [454.093, 454.093, 416, 240]
    for name, (x, y, z) in {
        "static": (0, 0, 0),
        "pan_left": (-1, 0, 0),
        "pan_up": (0, -1, 0),
        "zoom_in": (0, 0, 2),
        "pan_right_down": (1, 1, 0),
    }.items():
        assert moved[name][:4] == pytest.approx(lens, abs=1e-2)
        matrix = [1, 0, 0, x / 18, 0, 1, 0, y / 18, 0, 0, 1, z / 18]
        assert moved[name][4:] == pytest.approx(matrix, abs=1e-9), name
    assert moved["anticlockwise"][5] == pytest.approx(0.038776, abs=1e-5)  # sin(pi / 81)
    assert moved["clockwise"][5] == pytest.approx(-0.038776, abs=1e-5)


REFUSED = [
    (["task=fun-inp-A14B", "src_video=VIDEO"], "src_video is given, but fun-inp-A14B takes"),
    (["task=fun-inp-A14B", "src_ref_images=IMAGE"], "fun-control-\\* would take src_ref_images"),
    (["task=fun-control-14B", "last_frame=IMAGE"], "last_frame is given, but fun-control-14B"),
    (["task=fun-camera-14B", "camera=static", "last_frame=IMAGE"], "last_frame is given"),
    (["task=fun-inp-A14B", "image=IMAGE", "first_frame=IMAGE"], "mean the same"),
    (["task=fun-inp-A14B", "camera=pan_left"], "fun-inp-A14B has no camera adapter"),
    (["task=t2v-1.3B", "fit=crop"], "fit=crop is for the Fun models"),
    (["task=fun-inp-A14B", "fit=squash"], "fit=squash is not one of stretch, crop"),
    (["task=fun-inp-A14B", "max_area=399360"], "max_area=399360: fun-inp-A14B takes size="),
    (["task=fun-control-A14B", "src_ref_images=IMAGE,IMAGE"], "has 2 images, and .* takes one"),
    (["task=fun-control-A14B", "src_video=VIDEO"], "has 9 frames at 24 fps.* all are.*: 9, .*=81"),
    (["task=fun-control-A14B", "src_video=VIDEO", "fps=12"], "one in 2 is.*: 5, .*frame_num=5,"),
    (["task=fun-camera-A14B"], "camera is missing: .* pan_left"),
    (["task=fun-camera-A14B", "camera=pan_lift"], "neither a motion .* nor a file of poses"),
    (["task=fun-camera-A14B", "camera=POSES"], "has 2 poses, and frame_num=81 needs as many"),
    (["task=fun-camera-A14B", "camera=BROKEN"], "line 3: a pose is 19 numbers"),
    (["task=fun-inp-A14B", "image=IMAGE", "last_frame=IMAGE", "frame_num=1"], "at least 5"),
    (["task=fun-inp-A14B", "image=IMAGE", "clips=2"], "clips=2"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    pose = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
    (tmp_path / "poses.txt").write_text(f"first line\n{pose}\n{pose}\n")
    (tmp_path / "broken.txt").write_text(f"first line\n{pose}\n0 1 2\n")
    files = {"IMAGE": "a.png", "POSES": "poses.txt", "BROKEN": "broken.txt", "VIDEO": "a.mp4"}
    if any("VIDEO" in argument for argument in arguments):
        make_video(tmp_path / "a.mp4")
    for name, file in files.items():
        arguments = [argument.replace(name, str(tmp_path / file)) for argument in arguments]
    with pytest.raises(InputError, match=message):
        make_run_plan("prompt=x", *arguments)


def test_checkpoints_of_other_tasks_are_refused_by_their_tensors(tmp_path: Path) -> None:
    control, camera = (golden_folder(f"wan-fun/{name}-a14b") for name in ("control", "camera"))
    for folder, task, message in (
        (camera, "fun-inp-A14B", "1536 camera channels, not 0"),
        (control, "fun-inp-A14B", "52 input channels, not 36, 16 reference channels, not 0"),
        (golden_folder("wan-fun/inp-a14b"), "fun-camera-A14B", "0 camera channels, not 1536"),
    ):
        with pytest.raises(InputError, match=message):
            open_checkpoint(folder, TASKS[task], torch.float32)
    files = [
        control / f"{noise}_noise_model/diffusion_pytorch_model.safetensors"
        for noise in ("high", "low")
    ]
    given = {"dit_file": files}
    task = TASKS["fun-control-A14B"]
    assert open_checkpoint(control, task, torch.float32, given_files=given).transformers


def test_a_reference_image_needs_its_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first Control models have none; without a reference they run."""
    golden = golden_folder("wan-fun/control-2.1-14b")
    weights = load_file(golden / "diffusion_pytorch_model.safetensors")
    without = {key: value for key, value in weights.items() if not key.startswith("ref_conv")}
    folder = copy_checkpoint(golden, tmp_path / "v1.0", without)
    settings = [*list_settings(golden_folder("wan-fun/control-2.1-14b"), "ref", "fun-control-14B")]
    settings.append(f"ckpt_dir={folder}")
    assert main(settings) == 2
    told = capsys.readouterr().err
    assert "this checkpoint has no ref_conv" in told
    assert "text " not in told  # nothing was loaded
    assert main([key for key in settings if not key.startswith("src_ref_images")]) == 0


def test_pictures_are_cut_on_request() -> None:
    settings = list_settings(golden_folder("wan-fun/inp-a14b"), "start_end", "fun-inp-A14B")
    expected = load_file(golden_folder("wan-fun/inp-a14b") / "expected/start_end.safetensors")
    assert main([*settings, "fit=crop"]) == 0
    latents = load_file("out/out.latents.safetensors")["latents"]
    assert relative_error(latents, expected["final_latent"]) > 1e-3


def test_quantised_and_streamed_blocks_are_the_resident_ones() -> None:
    settings = list_settings(golden_folder("wan-fun/control-a14b"), "ref", "fun-control-A14B")
    videos = []
    for more in (["quant=int8"], ["quant=int8", "memory.dit=stream", "memory.slice_tokens=17"]):
        folder = f"out{len(videos)}"
        assert main([*settings, *more, f"output.dir={folder}"]) == 0
        videos.append(load_file(f"{folder}/out.safetensors")["video"])
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)


def test_control_of_5b_without_control_is_inp(tmp_path: Path) -> None:
    """With weights of 0 for the control video; a reference changes all but the given first frame."""
    folder = golden_folder("wan-fun/inp-5b")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    patches = weights["patch_embedding.weight"]
    blank = torch.zeros_like(patches[:, :48])
    weights["patch_embedding.weight"] = torch.cat([patches[:, :48], blank, patches[:, 48:]], dim=1)
    make_video(tmp_path / "control.mp4", "96x64", 9)
    settings = list_settings(folder, "start_end", "fun-control-5B")
    settings.append(f"src_video={tmp_path / 'control.mp4'}")
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    weights_file = tmp_path / "a.safetensors"
    save_file(weights, weights_file)
    latents = make_latents(*settings, f"dit_file={weights_file}", name="plain")
    expected = load_file(folder / "expected/start_end.safetensors")["final_latent"]
    assert relative_error(latents, expected) < 1e-3
    generator = torch.Generator().manual_seed(1)
    conv = torch.randn(32, 48, 2, 2, generator=generator)
    weights |= {"ref_conv.weight": conv, "ref_conv.bias": torch.zeros(32)}
    save_file(weights, weights_file)
    reference = f"src_ref_images={folder / 'end.png'}"
    steered = make_latents(*settings, f"dit_file={weights_file}", reference, name="steered")
    assert torch.equal(steered[:, 0], latents[:, 0])
    assert relative_error(steered, latents) > 1e-3


def test_inp_of_wan_2_1_is_image_to_video(tmp_path: Path) -> None:
    """Of an image that has the video's size, as then nothing is fitted."""
    folder = golden_folder("wan2.1-i2v")
    run = json.loads((folder / "expected/unipc.json").read_text(encoding="utf-8"))
    (path,) = folder.glob("*.png")
    Image.open(path).convert("RGB").resize((64, 48)).save(tmp_path / "image.png")
    settings = [
        *(f"ckpt_dir={folder}", f"prompt={run['prompt']}", f"image={tmp_path / 'image.png'}"),
        *("size=64x48", "frame_num=9", "sample.steps=3", "sample.solver=unipc", "sample.shift=3"),
        *("sample.guide_scale=4", "dtype=float32", "device=cpu", "cache.dir=null"),
        *("output.dir=out", "negative_prompt=blurred"),
    ]
    expected = make_latents("task=i2v-14B", *settings, name="i2v")
    latents = make_latents("task=fun-inp-14B", *settings, name="fun")
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert main(["task=fun-inp-14B", *[key for key in settings if key[:6] != "image="]]) == 0


def test_camera_of_wan_2_1_without_motion_is_control_without_video(tmp_path: Path) -> None:
    """With weights of 0 in the adapter; others change the video."""
    golden = golden_folder("wan-fun/control-2.1-14b")
    weights = load_file(golden / "diffusion_pytorch_model.safetensors")
    weights = {key: value for key, value in weights.items() if not key.startswith("ref_conv")}
    settings = [
        setting
        for setting in list_settings(golden, "start", "fun-control-14B")
        if not setting.startswith(("src_video", "ckpt_dir", "task"))
    ]
    control = copy_checkpoint(golden, tmp_path / "control", weights)
    expected = make_latents(
        *settings, "task=fun-control-14B", f"ckpt_dir={control}", name="control"
    )
    patches = weights["patch_embedding.weight"]
    weights["patch_embedding.weight"] = torch.cat([patches[:, :16], patches[:, 32:]], dim=1)
    shapes = {"conv": (32, 1536, 2, 2)}
    shapes |= {f"residual_blocks.0.conv{index}": (32, 32, 3, 3) for index in (1, 2)}
    adapter = {
        f"control_adapter.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()
    }
    adapter |= {f"control_adapter.{name}.bias": torch.zeros(32) for name in shapes}
    settings += ["task=fun-camera-14B", "camera=pan_left"]
    still_folder = copy_checkpoint(golden, tmp_path / "still", weights | adapter)
    still = make_latents(*settings, f"ckpt_dir={still_folder}", name="still")
    generator = torch.Generator().manual_seed(1)
    adapter["control_adapter.conv.weight"].normal_(std=0.1, generator=generator)
    moving_folder = copy_checkpoint(golden, tmp_path / "moving", weights | adapter)
    moving = make_latents(*settings, f"ckpt_dir={moving_folder}", name="moving")
    torch.testing.assert_close(still, expected, rtol=0, atol=1e-5)
    assert relative_error(moving, expected) > 1e-2
