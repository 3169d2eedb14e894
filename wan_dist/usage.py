"""Usage text of a run: its keys, with their defaults, and examples; imports no torch."""

from collections.abc import Iterator

from wan_dist.config.compose import CONFIG_FOLDER
from wan_dist.config.schema import list_settings
from wan_dist.tasks.registry import TASKS

OTHER_COMMANDS = "plan | doctor | fetch | local | mask | serve | submit | runs | gallery"
"""Of `launch`, which imports this module."""
_NO_DEFAULT = "???"
"""OmegaConf's marker of a setting whose default is the task's."""
USAGE_EXAMPLES = (
    "  python -m wan_dist.run task=toy\n"
    '  python -m wan_dist.run task=t2v-1.3B prompt="Two cats, boxing on a stage" seed=7\n'
    "  python -m wan_dist.run task=t2v-14B ckpt_dir=/models/Wan2.1-T2V-14B prompt=@prompt.txt"
    " size=832x480 sample.steps=30\n"
    "  python -m wan_dist.run task=t2v-1.3B latents=outputs/NAME.latents.safetensors"
    "     # decode again, without denoising\n"
    "  python -m wan_dist.run from=cats.mp4 seed=8"
    "                               # a video again, from the settings in it\n"
    "  torchrun --nproc_per_node=8 -m wan_dist.run task=t2v-14B jobs=prompts.txt output.dir=videos"
    "     # a video for each line\n"
    '  python -m wan_dist.run task=t2v-1.3B prompt="A cat" --multirun seed=1,2,3 sample.guide_scale=3,5'
    "     # six videos\n"
    "  python -m wan_dist.run task=t2v-1.3B --cfg job"
    "                                    # print all settings, run nothing"
)


def build_help_text() -> str:
    """Return the text that ``--help`` prints."""
    presets = sorted(path.stem for path in (CONFIG_FOLDER / "preset").glob("*.yaml"))
    return "\n".join(
        [
            "Generate a video with the Wan models: python -m wan_dist.run task=NAME [key=value ...]",
            f"\nTasks: {', '.join(TASKS)}",
            f"Presets of few-step models: {', '.join(presets)}",
            "\nA task sets its own defaults in conf/task/NAME.yaml; in brackets are those of all others.",
            *_format_key_lines(),
            f"\nExamples:\n{USAGE_EXAMPLES}\n\n"
            "--hydra-help lists the flags of Hydra, which reads the configuration.\n"
            f"Other commands, each with --help: python -m launch {OTHER_COMMANDS}",
        ]
    )


def _format_key_lines() -> Iterator[str]:
    """Yield the lines of all keys: those that every run needs first, then section by section."""
    settings = list_settings()
    required_keys = ("task", "prompt")
    sections = dict.fromkeys(key.rpartition(".")[0] for key in settings)
    groups = {"Required": required_keys} | {
        section.capitalize() or "General": [
            key
            for key in settings
            if key.rpartition(".")[0] == section and key not in required_keys
        ]
        for section in sections
    }
    for title, keys in groups.items():
        yield f"\n{title}:"
        for key in keys:
            setting = settings[key]
            has_default = setting.default not in (None, _NO_DEFAULT)
            default_text = f" [{str(setting.default).lower()}]" if has_default else ""
            yield f"  {key:24} {setting.metadata['help']}{default_text}"
