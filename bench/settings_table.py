"""Tables of the settings and of the tasks, from the schema, conf/ and the plan."""

from collections.abc import Iterator
from typing import Any

from launch.plan import plan_dry_run
from wan_dist.config.compose import CONFIG_FOLDER
from wan_dist.config.schema import RunConfig, list_settings
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.noise_schedule import uses_shift
from wan_dist.planning.sampling_plan import plan_sampling
from wan_dist.planning.workload import GIB
from wan_dist.tasks.base import Task
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.run_config import read_config
from wan_dist.weights.published_files import PUBLISHED_FILES

_SECTION_TITLES = {
    "": "General",
    "parallel": "parallel",
    "fsdp": "fsdp",
    "memory": "memory",
    "cache": "cache",
    "sample": "sample",
    "output": "output",
    "serve": "serve",
}
_LARGEST_FUN_TASK = "fun-camera-A14B"
_FUN_LINK = "[the Fun models](docs/tasks.md#the-fun-models)"
_FUN_INPUTS = "`prompt`, perhaps images, `src_video` and `src_ref_images`, or `camera`"
_LARGE_GPU, _HOST = 139 * GIB, 256 * GIB


def list_setting_lines() -> Iterator[str]:
    """Yield a heading and a table for each section of the schema: key, default and help."""
    for section, title in _SECTION_TITLES.items():
        yield from (f"### {title}", "", "| key | default | meaning |", "|---|---|---|")
        for key, setting in list_settings().items():
            if key.rpartition(".")[0] == section:
                text = setting.metadata["help"].replace("|", "\\|").replace("*", "\\*")
                default = "required" if key == "task" else _format_default(setting.default)
                yield f"| `{key}` | {default} | {text} |"
        yield ""


def _format_default(value: Any) -> str:
    if value is None:
        return ""
    if value == "???":
        return "the task's"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def list_task_rows() -> Iterator[list[str]]:
    """Yield the titles, then the defaults of each task."""
    yield ["task", "size", "frames", "fps", "steps", "shift", "guidance", "sides are multiples of"]
    for task in TASKS.values():
        config = _read_task_config(task)
        shift = config.sample.shift
        shift_text = (
            f"{shift:g}" if shift else "{:g} up to 480P, {:g}".format(*task.default_shifts or ())
        )
        low, high = config.sample.parse_guide_scales()
        guidance = f"{low:g}" if low == high else f"{low:g} low, {high:g} high noise"
        counts = [config.frame_num, config.fps, config.sample.steps]
        multiple = str(task.size_multiple[0])
        yield [f"`{task.name}`", config.size, *map(str, counts), shift_text, guidance, multiple]


def list_preset_rows() -> Iterator[list[str]]:
    """Yield the titles, then for each preset what it is for and how it samples its task, or t2v-14B."""
    yield ["preset", "for", "solver", "steps", "shift", "timesteps that the model is told"]
    for file in sorted((CONFIG_FOLDER / "preset").glob("*.yaml")):
        if file.stem == "none":
            continue
        task = TASKS["toy" if file.stem.startswith("toy") else "t2v-14B"]
        config = _read_task_config(task, f"preset={file.stem}")
        width, height = config.parse_size()
        sampling = plan_sampling(config.sample, task, width * height)
        _, comment, *_ = file.read_text(encoding="utf-8").splitlines()
        purpose = comment.removeprefix("# ").partition(": ")[0]
        timesteps = ", ".join(f"{timestep:.4g}" for timestep in sampling.schedule.timesteps)
        counts = [
            str(config.sample.steps),
            f"{sampling.shift:g}" if uses_shift(config.sample) else "",
        ]
        yield [f"`{file.stem}`", purpose, f"`{config.sample.solver}`", *counts, timesteps]


def list_published_rows() -> Iterator[list[str]]:
    """Yield the titles, then the name and the repository of each of the published files."""
    yield ["name", "files", "preset", "repository"]
    for files in PUBLISHED_FILES.values():
        yield [f"`{files.name}`", files.description, f"`{files.preset}`", files.repository]


def list_overview_rows() -> Iterator[list[str]]:
    """Yield the titles, then input and GPU memory of each task at its default size, for the README.

    Tasks of which all that is equal share a row, and the Fun models have one, of the one that needs most.
    """
    yield ["task", "input", "result", "GPU GiB, all resident", "GPU GiB, at least"]
    links_by_facts: dict[tuple[str, ...], list[str]] = {}
    for task in TASKS.values():
        if task.name == "toy" or task.family != task.name != _LARGEST_FUN_TASK:
            continue
        config = _read_task_config(task)
        count = f"{config.frame_num} frames" if config.frame_num > 1 else "one image"
        count += " a clip" if task.inputs.kind == "speech" else ""
        result = f"{config.size}, {count}"
        peaks = [_plan_peak(task, preset) for preset in ("fast", "minimal")]
        link = f"[{task.name}](docs/tasks.md#{task.name.lower().replace('.', '')})"
        inputs = _list_inputs(task)
        if task.family != task.name:
            link, inputs = _FUN_LINK, _FUN_INPUTS
        facts = (inputs, result, *(f"{peak:.1f}" for peak in peaks))
        links_by_facts.setdefault(facts, []).append(link)
    for facts, links in links_by_facts.items():
        yield [", ".join(links), *facts]


def _list_inputs(task: Task) -> str:
    if task.inputs.folder_key is not None:
        return f"`{task.inputs.folder_key}`"
    keys = ["`prompt`", *(f"`{key}`" for key in task.inputs.file_keys)]
    if task.inputs.is_required and (num_needed := len(task.inputs.choose_keys(()))) < len(keys) - 1:
        keys[1 + num_needed] = f"perhaps {keys[1 + num_needed]}"
    if task.inputs.file_keys and not task.inputs.is_required:
        keys[1] = f"perhaps {keys[1]}"
    if task.inputs.alternative_keys:
        keys[-1] += f" or {' and '.join(f'`{key}`' for key in task.inputs.alternative_keys)}"
    return ", ".join(keys)


def _read_task_config(task: Task, *settings: str) -> RunConfig:
    config = read_config([f"task={task.name}", *settings])
    assert config is not None
    return config


def _plan_peak(task: Task, preset: str) -> float:
    config = _read_task_config(task, f"memory={preset}")
    plan = plan_dry_run(config, Hardware(_LARGE_GPU, _HOST, ""), (1, 1))
    return max(stage.gpu_bytes for stage in plan.stage_memories) / GIB
