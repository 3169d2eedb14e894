"""What is installed, tried out: torch and its arithmetic on each GPU, NCCL, attention kernels, ffmpeg, a task's checkpoint and plan."""

import importlib
import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.findings import FAULT, NOTE, OK, Finding
from launch.plan import hardware_of, rehearsed
from wan_dist.config.schema import RunConfig
from wan_dist.planning.hardware import find_gpus
from wan_dist.runtime.errors import InputError, first_line
from wan_dist.tasks.registry import get_task

_LEAST_TORCH = (2, 10)
_OPTIONAL = ("triton", "flash-attn-4", "flash-attn", "sageattention", "xfuser", "torchao")
_FASTER = "pip install --pre flash-attn-4: a step took 10 % less with it on an H200"
_INSTALL = "install the build of torch for this driver's CUDA: pytorch.org/get-started has the command"


def check_torch() -> Iterator[Finding]:
    """Look at torch, and let each GPU that it sees multiply."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    found = f"{torch.__version__}, {cuda}"
    gpus = find_gpus()
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _LEAST_TORCH:
        yield Finding("torch", found, FAULT, f"torch {'.'.join(map(str, _LEAST_TORCH))} or later is needed")
    elif gpus and not torch.version.cuda:
        yield Finding("torch", f"{found}, and there are GPUs", FAULT, _INSTALL)
    elif gpus and (fault := _cuda_fault()):
        yield Finding("torch", f"{found}, does not see the GPUs: {fault}", FAULT, f"{_INSTALL}; or update the driver")
    else:
        yield Finding("torch", found)
    for number in range(torch.cuda.device_count() if torch.version.cuda else 0):
        yield from _of_gpu(number)
    if torch.cuda.device_count() > 1:
        yield from _of_pairs()


def _cuda_fault() -> str:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as fault:
        return first_line(fault)
    return ""


def _of_gpu(number: int) -> Iterator[Finding]:
    import torch

    capability = torch.cuda.get_device_capability(number)
    subject, name = f"GPU {number}", f"compute capability {capability[0]}.{capability[1]}"
    built = torch.cuda.get_arch_list()
    if not is_built_for(capability, built):
        yield Finding(subject, f"{name}, and torch is built for {' '.join(built)}", FAULT, _INSTALL)
        return
    size = 512
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    try:
        product = (x.to(f"cuda:{number}", torch.bfloat16) @ x.to(f"cuda:{number}", torch.bfloat16).T).float().cpu()
    except RuntimeError as fault:
        advice = "another process may hold the GPU (exclusive mode), or it fell off the bus: nvidia-smi, then restart the machine"
        yield Finding(subject, f"{name}, cannot compute: {first_line(fault)}", FAULT, advice)
        return
    error = (product - x @ x.T).norm() / (x @ x.T).norm()
    if not error < 1e-2:
        yield Finding(
            subject, f"{name}, computes wrongly: a product is off by {error:.1g}", FAULT, "its hardware may be failing; take another"
        )
    elif capability < (8, 0):
        advice = "no bfloat16 arithmetic: attention is done in float16, and all is slow"
        yield Finding(subject, name, NOTE, advice)
    else:
        yield Finding(subject, f"{name}, multiplies rightly")


def is_built_for(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether code for one of these architectures, e.g. sm_90 or compute_120, runs on a GPU: the same major, or what can be translated."""
    for name in built:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        version = (int(digits[:-1]), int(digits[-1]))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return not built


def _of_pairs() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    apart = [(a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)]
    version = ".".join(map(str, torch.cuda.nccl.version()))
    measure = f"torchrun --nproc_per_node={count} -m launch doctor measures it"
    if apart:
        found = f"NCCL {version}; GPUs {apart[0][0]} and {apart[0][1]} cannot reach each other's memory and send through the host's"
        yield Finding("exchange", found, NOTE, f"{measure}; parallel.cfg=2 sends least")
    else:
        yield Finding("exchange", f"NCCL {version}; all GPUs reach each other's memory; {measure}")


def check_packages() -> Iterator[Finding]:
    """Import all that a run imports, and list what may be there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("wan_dist.pipeline.generate")
    except Exception as fault:  # a package may raise anything as it is imported
        missing = getattr(fault, "name", "") or ""
        advice = "pip install --upgrade wan-dist in an environment of its own; packages of different years do not go together"
        yield Finding("packages", f"a run cannot start: {type(fault).__name__}: {first_line(fault)} {missing}".strip(), FAULT, advice)
        return
    found = [f"transformers {importlib.metadata.version('transformers')}"]
    for package in _OPTIONAL:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("packages", ", ".join(found))


def check_attention() -> Iterator[Finding]:
    """Try the attention kernels on a tiny tensor each."""
    import torch

    from wan_dist.config.schema import ATTENTION_BACKENDS, EIGHT_BIT_ATTENTION
    from wan_dist.models.attention.backends import try_attention
    from wan_dist.models.attention.inner import choose_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    taken = choose_attention("auto", device=device, dtype=torch.bfloat16, head_dim=128).name
    if device.type == "cpu":
        yield Finding("attention", f"auto takes {taken}")
        return
    works, faults = [], []
    for name in ATTENTION_BACKENDS[1:]:
        kernel, fault = try_attention(name, device=device, dtype=torch.bfloat16, head_dim=128)
        if kernel is None:
            faults.append(f"{name} ({fault})")
        elif name != taken:
            works.append(f"{name}, which changes the result" if name in EIGHT_BIT_ATTENTION else name)
    found = f"auto takes {taken}; {', '.join(works)} work too; not {', '.join(faults) or 'one does not'}"
    slow = torch.cuda.get_device_capability() >= (9, 0) and taken not in ("fa4", "fa3")
    yield Finding("attention", found, NOTE if slow else OK, _FASTER if slow else "")


def check_ffmpeg() -> Iterator[Finding]:
    """Encode two frames."""
    from wan_dist.output.output_check import Outcome, check_output

    with tempfile.TemporaryDirectory() as folder:
        try:
            check_output(Path(folder), [Outcome("probe", 64, 64, 16)])
        except InputError as fault:
            yield Finding("ffmpeg", str(fault).split(": ", 1)[-1], FAULT)
            return
    yield Finding("ffmpeg", "encodes H.264")


def check_task(config: RunConfig) -> Iterator[Finding]:
    """Look at a task's checkpoint, if its folder is given, and whether it fits this machine."""
    task = get_task(config.task)
    if config.ckpt_dir is not None:
        from wan_dist.weights.hub import check_whole

        try:
            check_whole(Path(config.ckpt_dir).expanduser(), task)
        except InputError as fault:
            advice = f"python -m launch fetch {task.name} {config.ckpt_dir} completes it, where there is internet"
            yield Finding("checkpoint", str(fault), FAULT, advice)
            return
        yield Finding("checkpoint", f"{config.ckpt_dir} is whole")
    hardware, ranks = hardware_of({})
    try:
        plan = rehearsed(config, hardware, ranks)
    except InputError as fault:
        yield Finding("plan", str(fault), FAULT)
        return
    gpu = max(use.gpu_bytes for use in plan.uses) / 2**30
    yield Finding("plan", f"{plan.arrangement.words}; at most {gpu:.1f} GiB of a GPU" if hardware.gpu_bytes else plan.arrangement.words)
