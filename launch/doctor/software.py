"""Software checks, by trying it out.

Torch and its arithmetic on each GPU, NCCL, attention kernels, ffmpeg, a task's checkpoint and plan.
"""

import importlib
import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.findings import FAULT, NOTE, OK, Finding
from launch.plan import plan_dry_run, resolve_hardware
from wan_dist.config.schema import RunConfig
from wan_dist.config.video_formats import VIDEO_FORMATS
from wan_dist.config.weight_files import list_weight_files
from wan_dist.planning.hardware import find_gpus
from wan_dist.runtime.c_compiler import explain_missing_compiler
from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.ffmpeg import find_ffmpeg, list_encoders
from wan_dist.tasks.registry import get_task

_MIN_TORCH_VERSION = (2, 10)
_OPTIONAL_PACKAGES = ("triton", "flash-attn-4", "flash-attn", "sageattention", "xfuser", "torchao")
_ATTENTION_ADVICE = "pip install --pre flash-attn-4: a step took 10 % less with it on an H200"
_INSTALL_ADVICE = (
    "install the build of torch for this driver's CUDA: pytorch.org/get-started has the command"
)
_COMPILER_ADVICE = "Triton's kernels need one; without them PyTorch computes the same, slower"


def check_torch() -> Iterator[Finding]:
    """Check torch's version and build, and a matrix product on each GPU that it sees."""
    import torch

    cuda_text = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    message = f"{torch.__version__}, {cuda_text}"
    gpus = find_gpus()
    if (
        tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        < _MIN_TORCH_VERSION
    ):
        yield Finding(
            "torch",
            message,
            FAULT,
            f"torch {'.'.join(map(str, _MIN_TORCH_VERSION))} or later is needed",
        )
    elif gpus and not torch.version.cuda:
        from wan_dist.parallel.local_gpu import CUDA_PYTORCH_COMMAND

        yield Finding("torch", f"{message}, but GPUs were found", FAULT, CUDA_PYTORCH_COMMAND)
    elif gpus and (cuda_error := _find_cuda_error()):
        yield Finding(
            "torch",
            f"{message}, finds no GPU: {cuda_error}",
            FAULT,
            f"{_INSTALL_ADVICE}; or update the driver",
        )
    else:
        yield Finding("torch", message)
    if gpus and (problem := explain_missing_compiler()):
        yield Finding("compiler", problem, NOTE, _COMPILER_ADVICE)
    for gpu_index in range(torch.cuda.device_count() if torch.version.cuda else 0):
        yield from _check_gpu(gpu_index)
    if torch.cuda.device_count() > 1:
        yield from _check_peer_access()


def _find_cuda_error() -> str:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return get_first_line(error)
    return ""


def _check_gpu(gpu_index: int) -> Iterator[Finding]:
    import torch

    capability = torch.cuda.get_device_capability(gpu_index)
    subject, capability_text = (
        f"GPU {gpu_index}",
        f"compute capability {capability[0]}.{capability[1]}",
    )
    architectures = torch.cuda.get_arch_list()
    if not is_built_for(capability, architectures):
        yield Finding(
            subject,
            f"{capability_text}, and torch is built for {' '.join(architectures)}",
            FAULT,
            _INSTALL_ADVICE,
        )
        return
    size = 512
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    try:
        product = (
            (
                x.to(f"cuda:{gpu_index}", torch.bfloat16)
                @ x.to(f"cuda:{gpu_index}", torch.bfloat16).T
            )
            .float()
            .cpu()
        )
    except RuntimeError as error:
        advice = (
            "another process may hold the GPU (exclusive mode), or it fell off the bus: "
            "look at nvidia-smi, then restart the machine"
        )
        yield Finding(
            subject, f"{capability_text}, cannot compute: {get_first_line(error)}", FAULT, advice
        )
        return
    relative_error = (product - x @ x.T).norm() / (x @ x.T).norm()
    if not relative_error < 1e-2:
        yield Finding(
            subject,
            f"{capability_text}, computes incorrectly: a product is off by {relative_error:.1g}",
            FAULT,
            "its hardware may be failing; use another GPU",
        )
    elif capability < (8, 0):
        advice = "no bfloat16 arithmetic: attention is computed in float16, and everything is slow"
        yield Finding(subject, capability_text, NOTE, advice)
    else:
        yield Finding(subject, f"{capability_text}, a matrix product is correct")


def is_built_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for one of these architectures, e.g. sm_90 or compute_120, runs on a GPU.

    Binary code (sm) runs on the same major version, PTX (compute) on any later one.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        version = (int(digits[:-1]), int(digits[-1]))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return not architectures


def _check_peer_access() -> Iterator[Finding]:
    import torch

    num_gpus = torch.cuda.device_count()
    unreachable_pairs = [
        (a, b)
        for a in range(num_gpus)
        for b in range(num_gpus)
        if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    nccl_version = ".".join(map(str, torch.cuda.nccl.version()))
    measure_advice = f"torchrun --nproc_per_node={num_gpus} -m launch doctor measures it"
    if unreachable_pairs:
        first_gpu, second_gpu = unreachable_pairs[0]
        message = (
            f"NCCL {nccl_version}; GPUs {first_gpu} and {second_gpu} "
            "have no peer access and send through host memory"
        )
        yield Finding(
            "exchange", message, NOTE, f"{measure_advice}; parallel.cfg=2 sends the least"
        )
    else:
        yield Finding(
            "exchange", f"NCCL {nccl_version}; all GPUs have peer access; {measure_advice}"
        )


def check_packages() -> Iterator[Finding]:
    """Import all packages of a run, and list the versions of the optional ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("wan_dist.pipeline.generate")
    except Exception as error:  # a package may raise anything as it is imported
        missing_package = getattr(error, "name", "") or ""
        message = (
            f"a run cannot start: {type(error).__name__}: {get_first_line(error)} {missing_package}"
        )
        advice = (
            "pip install --upgrade wan-dist in an environment of its own; "
            "versions of packages that are years apart are incompatible"
        )
        yield Finding("packages", message.strip(), FAULT, advice)
        return
    versions = [f"transformers {importlib.metadata.version('transformers')}"]
    for package in _OPTIONAL_PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("packages", ", ".join(versions))


def check_attention() -> Iterator[Finding]:
    """Check which attention kernels work, on a tiny tensor each."""
    import torch

    from wan_dist.config.choices import ATTENTION_BACKENDS, EIGHT_BIT_BACKENDS
    from wan_dist.models.attention.backends import try_attention
    from wan_dist.models.attention.inner import choose_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen_backend = choose_attention(
        "auto", device=device, dtype=torch.bfloat16, head_dim=128
    ).name
    if device.type == "cpu":
        yield Finding("attention", f"auto selects {chosen_backend}")
        return
    working_backends, failures = [], []
    for name in ATTENTION_BACKENDS[1:]:
        kernel, reason = try_attention(name, device=device, dtype=torch.bfloat16, head_dim=128)
        if kernel is None:
            failures.append(f"{name} ({reason})")
        elif name != chosen_backend:
            working_backends.append(
                f"{name}, which changes the result" if name in EIGHT_BIT_BACKENDS else name
            )
    message = (
        f"auto selects {chosen_backend}; {', '.join(working_backends) or 'no other'} also works; "
        f"unavailable: {', '.join(failures) or 'none'}"
    )
    is_slow = torch.cuda.get_device_capability() >= (9, 0) and chosen_backend not in ("fa4", "fa3")
    verdict, advice = (NOTE, _ATTENTION_ADVICE) if is_slow else (OK, "")
    yield Finding("attention", message, verdict, advice)


def check_ffmpeg() -> Iterator[Finding]:
    """Check that ffmpeg encodes a short video."""
    from wan_dist.output.output_check import OutputEstimate, check_output_folder

    with tempfile.TemporaryDirectory() as folder:
        try:
            check_output_folder(Path(folder), [OutputEstimate("probe", 64, 64, 16)])
        except InputError as error:
            yield Finding("ffmpeg", str(error).split(": ", 1)[-1], FAULT)
            return
    encoders = list_encoders(find_ffmpeg())
    formats = [name for name, item in VIDEO_FORMATS.items() if item.encoder in encoders]
    yield Finding("ffmpeg", f"encodes {', '.join(formats)}")


def check_task(config: RunConfig) -> Iterator[Finding]:
    """Check a task's checkpoint, if its folder is given, and whether the task fits this machine."""
    task = get_task(config.task)
    if config.ckpt_dir is not None:
        from wan_dist.weights.hub import check_checkpoint_complete

        try:
            check_checkpoint_complete(
                Path(config.ckpt_dir).expanduser(), task, list_weight_files(config)
            )
        except InputError as error:
            advice = (
                f"python -m launch fetch {task.name} {config.ckpt_dir} completes it, "
                "on a machine with internet"
            )
            yield Finding("checkpoint", str(error), FAULT, advice)
            return
        yield Finding("checkpoint", f"{config.ckpt_dir} is complete")
    hardware, ranks = resolve_hardware({})
    try:
        plan = plan_dry_run(config, hardware, ranks)
    except InputError as error:
        yield Finding("plan", str(error), FAULT)
        return
    gpu_gib = max(stage_memory.gpu_bytes for stage_memory in plan.stage_memories) / 2**30
    message = plan.arrangement.description
    if hardware.gpu_bytes:
        message += f"; peak {gpu_gib:.1f} GiB of a GPU"
    yield Finding("plan", message)
