"""What videos made one after the other share: the ranks' groups, an open checkpoint, the attention kernel, loaded models, texts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from wan_dist.config.paths import packaged
from wan_dist.config.schema import RunConfig, split_files
from wan_dist.models.attention import cross as cross_attention
from wan_dist.models.attention.inner import InnerAttention, choose_attention, compile_attention
from wan_dist.models.dims import TransformerDims
from wan_dist.models.kernels import transformer_ops as transformer_elementwise
from wan_dist.models.text_encoder import token_ids
from wan_dist.output.stage_report import Report
from wan_dist.parallel.mesh import Axis, Groups, local_device
from wan_dist.parallel.shared_work import work_together
from wan_dist.parallel.usp import check_usp
from wan_dist.pipeline.model_cache import Shelf
from wan_dist.pipeline.out_of_memory import free_bytes
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.planning.digests import WeightsDigests
from wan_dist.planning.hardware import Hardware, find_host
from wan_dist.planning.memory_table import table
from wan_dist.planning.plan import Plan, arranged
from wan_dist.planning.residency import staying
from wan_dist.planning.workload import Arrangement
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.hub import find_checkpoint
from wan_dist.weights.identity import digest_of_weights

T = TypeVar("T")


@dataclass
class Session:
    """Videos of one checkpoint, one after the other."""

    groups: Groups
    device: torch.device
    checkpoint: Checkpoint
    choose: Callable[[], InnerAttention]
    """Returns the attention kernel; it may have to wait for one that is being compiled."""
    hardware: Hardware
    """As it was before a model was loaded."""
    shelf: Shelf = field(default_factory=Shelf)
    texts: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings (n, text_dim) of prompts on the CPU, on the replica's first rank: those that no prompt cache has."""
    prompt_cache: PromptCache | None = None
    """Where a batch's other embeddings are, there too."""
    shared_texts: PromptCache | None = None
    """Where those are that other replicas have made, and their ranks' prompt cache does not show here."""
    times: tuple[tuple[int, bool], ...] = ()
    """Timesteps that may come, and whether with a known first frame; of one video its own are enough."""
    lowered: Arrangement | None = None
    """What was stepped down to, where memory ran out."""
    keeps_experts: bool = False
    """Both transformers of a task that has two may stay, not just the one at work."""
    has_room_for_frames: bool = False
    """A video that is decoded may be written while the next one is denoised."""

    def together(self, work: Callable[[], T], what: str, *, exchanges: bool = True) -> T:
        """Do ``work`` on all ranks of the replica, see `work_together`; where they could not end it, models go that cannot be trusted."""
        try:
            return work_together(self.groups, work, what, exchanges=exchanges)
        except BaseException:
            if self.groups.is_aborted:
                self.shelf.clear()
            raise

    def lower(self, arrangement: Arrangement, report: Report) -> None:
        """Take an arrangement from now on, since memory ran out with the one before; all ranks of the replica."""
        report.facts["stepped_down_to"] = asdict(arrangement)
        self.lowered = arrangement
        self.keeps_experts = False
        self.shelf.clear()

    @property
    def digests(self) -> WeightsDigests:
        """Of what its results depend on."""
        return WeightsDigests(self.checkpoint.digest, self.checkpoint.vae_digest)

    @cached_property
    def text_encoder_digest(self) -> str:
        """Return a digest of the text encoder's weights and of its tokenizer's files."""
        tokenizer = Path(self.checkpoint.tokenizer.name_or_path)
        files = sorted(file for file in tokenizer.iterdir() if file.is_file())
        return " ".join([digest_of_weights([self.checkpoint.text_encoder.files]), *map(hash_file, files)])

    def place(self, model: str, which: int) -> str:
        """Return an expert's place on the shelf, which the experts share where both cannot stay."""
        return f"{model} {which}" if self.keeps_experts else model

    def arrange(self, plan: Plan, config: RunConfig, *, quiet: bool = False) -> Plan:
        """Return the plan with the arrangement for the memory that is there, the same on all ranks, and say so.

        Where models stay, they are in what each stage takes.
        """
        text_len = self.checkpoint.transformers[0].dims.text_len
        models, tokenizer = self.checkpoint.models, self.checkpoint.tokenizer
        plan = arranged(plan, config, self.hardware, models, lambda text: len(token_ids(tokenizer, text, text_len)))
        if self.shelf.keeps:
            plan = staying(plan, experts=2 if self.keeps_experts else 1)
        assert plan.budget is not None
        if not quiet:
            logger.info("plan      %s", plan.arrangement.words)
            for line in table(plan.uses, plan.budget.gpu, plan.budget.host):
                logger.info("          %s", line)
        return plan


def open_session(config: RunConfig, plan: Plan, groups: Groups, device: torch.device) -> Session:
    """Open the plan's checkpoint, choose its attention; raises InputError for what is wrong with them, before weights are read.

    All ranks of the run come to the same, or to an error.
    """
    checkpoint = _open_checkpoint(config, plan, groups)
    choose = _begin_to_choose(config.attention, device, getattr(torch, config.dtype), checkpoint.transformers[0].dims)
    if config.parallel.usp == "xfuser":
        check_usp(device, choose().name)
    host, limit = find_host()
    free = free_bytes(device, Axis()) if device.type == "cuda" else None
    told = groups.team.gather((checkpoint.digest, free, host, limit), "open the checkpoint")
    if mismatches := [rank for rank, (digest, *_) in enumerate(told) if digest != told[0][0]]:
        raise InputError(f"{checkpoint.folder} holds other weights on rank {mismatches[0]} than on rank 0; give all nodes the same files")
    own = [told[rank] for rank in groups.replica_ranks]
    least = min(own, key=lambda found: found[2])
    gpu = None if free is None else min(found[1] for found in own)
    return Session(groups, device, checkpoint, choose, Hardware(gpu, least[2], host_limit=least[3], has_context=True))


def find_device(config: RunConfig) -> torch.device:
    """Return this rank's device, with its memory limited to the budget if there is one."""
    available = torch.cuda.is_available()
    if "cuda" in (config.device, config.noise_device) and not available:
        key = "device" if config.device == "cuda" else "noise_device"
        raise InputError(f"{key}=cuda, but PyTorch {torch.__version__} sees no GPU here; {key}=cpu works")
    device = local_device("cuda" if config.device == "cuda" or (config.device == "auto" and available) else "cpu")
    if (budget := config.memory.budget_gib) is not None:
        if device.type != "cuda":
            raise InputError(f"memory.budget_gib={budget} limits GPU memory, and this run is on the CPU; leave it out")
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        if budget > total:
            raise InputError(f"memory.budget_gib={budget} is more than the GPU's {total:.1f} GiB")
        torch.cuda.set_per_process_memory_fraction(budget / total, device)
    # TensorFloat-32 keeps 10 bits of a float32 product: fine beside bfloat16, not where float32 was asked for.
    torch.backends.cudnn.allow_tf32 = config.dtype != "float32"
    return device


def _open_checkpoint(config: RunConfig, plan: Plan, groups: Groups) -> Checkpoint:
    """Open the checkpoint; what must be fetched is so by the first rank of each node."""

    def find() -> Path:
        return packaged("toy", "toy/checkpoint") if plan.task.name == "toy" else find_checkpoint(plan.task, area=plan.width * plan.height)

    given = [] if config.dit_file is None else split_files(config.dit_file)
    if config.ckpt_dir is not None:
        folder = Path(config.ckpt_dir).expanduser()
    else:  # it may have to be downloaded, for as long as that takes
        found = find() if groups.local_rank == 0 else None
        groups.team.gather(None, "find the checkpoint, or download it")
        folder = find() if found is None else found
    return open_checkpoint(folder, plan.task, getattr(torch, config.dtype), transformer_files=given)


def _begin_to_choose(name: str, device: torch.device, dtype: torch.dtype, dims: TransformerDims) -> Callable[[], InnerAttention]:
    """Return what chooses the attention kernel; what has to be compiled for it begins to be, and is while texts are encoded.

    Raises InputError at once if a kernel asked for by name does not work here.
    """

    def try_out() -> InnerAttention:
        return choose_attention(name, device=device, dtype=dtype, head_dim=dims.head_dim)

    chosen = try_out() if name != "auto" or device.type != "cuda" else None
    if chosen is not None and device.type != "cuda":
        return lambda: chosen

    def compile_all() -> None:
        torch.cuda.set_device(device)  # a thread's own is the first GPU
        transformer_elementwise.prepare_kernels(device, dims.dim)
        cross_attention.prepare_kernels(device, dims.head_dim)
        if chosen is None:
            compile_attention(device=device, dtype=dtype, head_dim=dims.head_dim)

    thread = ThreadPoolExecutor(1)
    compiled = thread.submit(compile_all)
    thread.shutdown(wait=False)

    def choose() -> InnerAttention:
        compiled.result()
        return chosen if chosen is not None else try_out()

    return choose
