"""Cluster configuration: hardware of the nodes, and options of Slurm.

Read from conf/cluster/NAME.yaml, or from a file of your own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.arguments import expand_user_path
from wan_dist.config.compose import CONFIG_FOLDER, explain_config_error
from wan_dist.planning.hardware import parse_bytes
from wan_dist.runtime.errors import InputError, suggest_nearest

_CLUSTER_FOLDER = CONFIG_FOLDER / "cluster"


@dataclass
class ClusterConfig:
    """Configuration of a cluster; ``null``, as for its partition, leaves an option to Slurm's default."""

    gpus_per_node: int = 8
    gpu_memory: str = "80GB"
    gpu_type: str | None = None
    """Slurm's name of the GPUs, as in --gpus-per-node=h100:8."""
    host_memory: str = "512GB"
    """Memory of a node that jobs may request."""
    cpus_per_gpu: int = 8
    tflops: float = 150.0
    """TFLOP/s of a GPU in these models, a cautious value; for the time limit that is requested."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    fetch_partition: str | None = None
    """Partition with internet, for downloads."""
    fetch_time: str = "04:00:00"
    max_time: str | None = None
    """Longest time limit of a job; a run that takes longer saves its state, is requeued and resumes."""
    signal_seconds: int = 120
    """Seconds before its time limit at which a job is told to save its state; more if steps take longer."""
    setup: list[str] = field(default_factory=list)
    """Shell lines, such as module load, after which ``python`` has wan_dist.

    None: the Python that submits is used.
    """
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the run, such as NCCL_SOCKET_IFNAME."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive."""

    def __post_init__(self) -> None:
        for key in ("gpu_memory", "host_memory"):
            parse_bytes(getattr(self, key), f"cluster.{key}")
        for key in ("gpus_per_node", "cpus_per_gpu", "tflops", "signal_seconds"):
            if getattr(self, key) <= 0:
                raise InputError(f"cluster.{key}={getattr(self, key)} must be above 0")
        for key in ("fetch_time", "max_time"):
            if (time_text := getattr(self, key)) is not None:
                parse_minutes(time_text, f"cluster.{key}")
        texts = [
            getattr(self, setting.name)
            for setting in fields(self)
            if isinstance(getattr(self, setting.name), str)
        ]
        if any("\n" in text for text in (*texts, *self.options)):
            raise InputError("cluster: a Slurm option has a line break; remove it")


def parse_minutes(text: str, key: str) -> int:
    """Return the minutes of a time as Slurm writes it: minutes, HH:MM:SS or D-HH:MM:SS; raises InputError."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+)(?::(\d\d))?", text)
    if not match or (":" in text and text.count(":") != 2):
        raise InputError(f"{key}={text} is not a time, e.g. {key}=02:30:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(1, days * 1440 + hours * 60 + minutes + (seconds > 0))


def list_cluster_names() -> list[str]:
    """Return the names of the clusters in conf/cluster/."""
    return sorted(path.stem for path in _CLUSTER_FOLDER.glob("*.yaml"))


def load_cluster(name: str, changes: Sequence[str]) -> ClusterConfig:
    """Return the cluster of this name or file, with changes such as ``partition=gpu``; raises InputError."""
    file = _CLUSTER_FOLDER / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        file = expand_user_path("cluster", name)
    if not file.is_file():
        known_names = list_cluster_names()
        raise InputError(
            f"cluster={name} is unknown; use {', '.join(known_names)}, "
            f"or a file of your own, cluster=mine.yaml{suggest_nearest(name, known_names)}"
        )
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(ClusterConfig),
            OmegaConf.load(file),
            OmegaConf.from_dotlist(list(changes)),
        )
        return cast(ClusterConfig, OmegaConf.to_object(merged))
    except InputError:  # of a value
        raise
    except OmegaConfBaseException as error:
        raise InputError(f"cluster={name}: {explain_config_error(error)}") from None
    except (OSError, ValueError, YAMLError) as error:
        raise InputError(
            f"cluster={name}: {file} cannot be read: {' '.join(str(error).split())}"
        ) from None
