"""Session shared by consecutive videos: process groups, checkpoint, attention, models, prompt embeddings."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from wan_dist.config.choices import TRAINED_ATTENTIONS
from wan_dist.config.loras import list_loras
from wan_dist.config.paths import find_packaged_folder
from wan_dist.config.schema import RunConfig
from wan_dist.config.weight_files import list_weight_files
from wan_dist.models.attention import block_sparse
from wan_dist.models.attention import cross as cross_attention
from wan_dist.models.attention.inner import InnerAttention, choose_attention, compile_attention
from wan_dist.models.attention.sla import DEFAULT_KEY_SHARE, QUERY_BLOCK
from wan_dist.models.dims import TransformerDims
from wan_dist.models.kernels import transformer_ops
from wan_dist.models.text_encoder import tokenize_prompt
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.local_gpu import check_pytorch_build
from wan_dist.parallel.mesh import Axis, ProcessGroups, select_local_device
from wan_dist.parallel.shared_work import run_together
from wan_dist.parallel.usp import check_usp
from wan_dist.pipeline.model_cache import ModelCache
from wan_dist.pipeline.out_of_memory import measure_free_bytes
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.planning.digests import WeightsDigests
from wan_dist.planning.hardware import Hardware, find_host_memory
from wan_dist.planning.memory_table import format_memory_table
from wan_dist.planning.plan import RunPlan, plan_memory
from wan_dist.planning.residency import (
    can_keep_experts,
    can_keep_models,
    plan_resident_models,
)
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.planning.workload import GIB, Arrangement
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.hub import find_checkpoint
from wan_dist.weights.layout import list_file_settings
from wan_dist.weights.lora import log_loras

T = TypeVar("T")


@dataclass
class Session:
    """State shared by consecutive videos of one checkpoint."""

    groups: ProcessGroups
    device: torch.device
    checkpoint: Checkpoint
    get_attention: Callable[[], InnerAttention]
    """Returns the attention kernel, and waits for it where it is still being compiled."""
    hardware: Hardware
    """Memory before any model was loaded."""
    model_cache: ModelCache = field(default_factory=ModelCache)
    prompt_embeddings: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings (n, text_dim) of prompts in no prompt cache, on the CPU of the replica's first rank."""
    audio_features: dict[str, Tensor] = field(default_factory=dict)
    """Features (1, layers, D, frames) of the last sound, on the CPU of that rank, by what they depend on."""
    prompt_cache: PromptCache | None = None
    """Cache of a batch's other embeddings, on that rank too."""
    shared_prompt_cache: PromptCache | None = None
    """Cache of embeddings that other replicas have made, in prompt caches that this rank does not see."""
    possible_timesteps: tuple[tuple[float, float, bool], ...] = ()
    """Timesteps of all videos, each with the next one and whether a first frame is known; a single video
    needs only its own.
    """
    fallback_arrangement: Arrangement | None = None
    """The fallback in use, where memory ran out."""
    keeps_both_experts: bool = False
    """Both transformers of a task that has two may stay loaded, not only the one in use."""
    has_memory_for_frames: bool = False
    """A video that is decoded may be written while the next one is denoised."""

    def run_together(
        self, work: Callable[[], T], purpose: str, *, uses_collectives: bool = True
    ) -> T:
        """Run ``work`` on all ranks of the replica; see `parallel.shared_work.run_together`.

        Where the process groups were aborted, the cached models are evicted: their shards are of no use any
        more.
        """
        try:
            return run_together(self.groups, work, purpose, uses_collectives=uses_collectives)
        except BaseException:
            if self.groups.is_aborted:
                self.model_cache.clear()
            raise

    def apply_fallback(self, arrangement: Arrangement, report: StageReport) -> None:
        """Use another arrangement from now on, on all ranks of the replica, after out of memory."""
        report.record.stepped_down_to = asdict(arrangement)
        self.fallback_arrangement = arrangement
        self.keeps_both_experts = False
        self.model_cache.clear()

    def choose_resident_models(self, plan: VideoPlan) -> None:
        """Decide which models stay loaded after a video of this plan, on all ranks of the replica alike."""
        self.model_cache.is_persistent = False
        run_plan = self.plan_memory(plan, quiet=True)
        self.keeps_both_experts = can_keep_experts(run_plan)
        self.model_cache.is_persistent = can_keep_models(run_plan)
        if not self.model_cache.is_persistent:
            self.model_cache.clear()

    @property
    def weights_digests(self) -> WeightsDigests:
        """Digests of the weights that its results depend on."""
        return WeightsDigests(self.checkpoint.digest, self.checkpoint.vae_digest)

    @property
    def text_encoder_digest(self) -> str:
        """Digest of the text encoder's weights and of its tokenizer."""
        return self.checkpoint.text_encoder_digest

    def get_cache_slot(self, model_name: str, expert_index: int) -> str:
        """Return an expert's slot in the model cache; the experts share one where both cannot stay."""
        return f"{model_name} {expert_index}" if self.keeps_both_experts else model_name

    def plan_memory(self, plan: VideoPlan, *, quiet: bool = False) -> RunPlan:
        """Return the plan with the arrangement for the available memory, the same on all ranks, and log it.

        Where models stay loaded, each stage's memory includes them.
        """
        text_len = self.checkpoint.transformers[0].dims.text_len
        models, tokenizer = self.checkpoint.model_dims, self.checkpoint.tokenizer
        if plan.model_settings.memory.gguf == "compressed" and not plan.has_saved_latents:
            self.checkpoint.check_compression()
        run_plan = plan_memory(
            plan,
            self.hardware,
            models,
            lambda text: len(tokenize_prompt(tokenizer, text, text_len)),
            self.checkpoint.compressed_blocks,
        )
        if self.model_cache.is_persistent:
            num_experts = 2 if self.keeps_both_experts else 1
            run_plan = plan_resident_models(run_plan, num_experts=num_experts)
        if not quiet:
            logger.info("plan      %s", run_plan.arrangement.description)
            if run_plan.gguf_note and not plan.has_saved_latents:
                logger.info("gguf      %s", run_plan.gguf_note)
            stages, budget = run_plan.stage_memories, run_plan.budget
            # a tiny model's memory does not matter, and would be printed as zeros
            if max(stage.gpu_bytes for stage in stages) >= GIB:
                for line in format_memory_table(stages, budget.gpu_bytes, budget.host_bytes):
                    logger.info("          %s", line)
        return run_plan


def open_session(
    config: RunConfig, plan: VideoPlan, groups: ProcessGroups, device: torch.device
) -> Session:
    """Open the plan's checkpoint and choose its attention kernel, the same on all ranks of the run.

    Raises InputError for what is wrong with them, before weights are read.
    """
    checkpoint = _open_checkpoint(config, plan, groups)
    check_trained_attention(config, plan, checkpoint)
    # That of a sparse self-attention needs no kernel; cross-attention has one beside it.
    requested_kernel = "auto" if config.attention in TRAINED_ATTENTIONS else config.attention
    get_attention = _prepare_attention(
        requested_kernel, device, getattr(torch, config.dtype), checkpoint.transformers[0].dims
    )
    if config.parallel.usp == "xfuser":
        check_usp(device, get_attention().name)
    host_bytes, host_limit = find_host_memory()
    free_gpu_bytes = measure_free_bytes(device, Axis()) if device.type == "cuda" else None
    facts_by_rank = groups.coordinator.gather(
        (checkpoint.digest, free_gpu_bytes, host_bytes, host_limit), "open the checkpoint"
    )
    if mismatched_ranks := [
        rank for rank, (digest, *_) in enumerate(facts_by_rank) if digest != facts_by_rank[0][0]
    ]:
        names = " or ".join(
            map(str, [checkpoint.folder, *(lora.file.setting.path for lora in checkpoint.loras)])
        )
        raise InputError(
            f"{names} has different weights on rank {mismatched_ranks[0]} and on rank 0; "
            "use the same files on all nodes"
        )
    replica_facts = [facts_by_rank[rank] for rank in groups.replica_ranks]
    lowest_host_facts = min(replica_facts, key=lambda facts: facts[2])
    gpu_bytes = None if free_gpu_bytes is None else min(facts[1] for facts in replica_facts)
    return Session(
        groups,
        device,
        checkpoint,
        get_attention,
        Hardware(
            gpu_bytes,
            lowest_host_facts[2],
            host_limit_name=lowest_host_facts[3],
            has_driver_context=True,
        ),
    )


def check_trained_attention(config: RunConfig, plan: VideoPlan, checkpoint: Checkpoint) -> None:
    """Raise InputError for settings that do not suit a transformer with, or without, sparse attention."""
    files, dims = checkpoint.transformers[0].files, checkpoint.transformers[0].dims
    trained_name = dims.trained_attention
    given_settings = [
        ("sla", config.attention == "sla", "attention=sla"),
        ("sla", config.sla_topk != DEFAULT_KEY_SHARE, f"sla_topk={config.sla_topk}"),
        ("vsa", config.attention == "vsa", "attention=vsa"),
        ("vsa", config.vsa_sparsity is not None, f"vsa_sparsity={config.vsa_sparsity}"),
    ]
    for name, is_given, setting in given_settings:
        if is_given and name != trained_name:
            raise InputError(
                f"{setting}: {files} was not trained with {name.upper()}; leave it out"
            )
    if trained_name is None:
        return
    problem = ""
    slice_tokens = config.memory.slice_tokens
    if config.attention not in ("auto", trained_name):
        problem = f"attention={config.attention} would blur its videos; leave it out"
    elif plan.degrees.ring > 1:
        problem = f"parallel.ring={plan.degrees.ring} cannot share it out; use parallel.ulysses"
    elif config.parallel.usp == "xfuser":
        problem = "parallel.usp=xfuser does not compute it; leave it out"
    elif slice_tokens is not None and slice_tokens % QUERY_BLOCK and trained_name == "sla":
        problem = f"memory.slice_tokens={slice_tokens} must be a multiple of {QUERY_BLOCK}"
    if problem:
        raise InputError(
            f"{files} was trained with sparse attention ({trained_name.upper()}): {problem}"
        )


def find_device(config: RunConfig) -> torch.device:
    """Return this rank's device, with its memory limited to the budget if there is one.

    Raises InputError for a device that PyTorch does not find.
    """
    has_gpu = torch.cuda.is_available()
    if config.device != "cpu" and not has_gpu:
        check_pytorch_build()
    if "cuda" in (config.device, config.noise_device) and not has_gpu:
        key = "device" if config.device == "cuda" else "noise_device"
        raise InputError(
            f"{key}=cuda, but PyTorch {torch.__version__} sees no GPU here; {key}=cpu works"
        )
    uses_gpu = config.device == "cuda" or (config.device == "auto" and has_gpu)
    device = select_local_device("cuda" if uses_gpu else "cpu")
    if (budget_gib := config.memory.budget_gib) is not None:
        if device.type != "cuda":
            raise InputError(
                f"memory.budget_gib={budget_gib} limits GPU memory, and this run is on the CPU; "
                "leave it out"
            )
        total_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        if budget_gib > total_gib:
            raise InputError(
                f"memory.budget_gib={budget_gib} is more than the GPU's {total_gib:.1f} GiB"
            )
        torch.cuda.set_per_process_memory_fraction(budget_gib / total_gib, device)
    # TensorFloat-32 keeps 10 bits of a float32 product: fine beside bfloat16, not where float32 is requested.
    torch.backends.cudnn.allow_tf32 = config.dtype != "float32"
    return device


def _open_checkpoint(config: RunConfig, plan: VideoPlan, groups: ProcessGroups) -> Checkpoint:
    """Open the checkpoint; the first rank of each node downloads what is missing."""
    given_files = list_weight_files(config)

    def find_folder() -> Path:
        return (
            find_packaged_folder("toy", "toy/checkpoint")
            if plan.task.name == "toy"
            else find_checkpoint(plan.task, area=plan.width * plan.height, given_files=given_files)
        )

    folder: Path | None = None
    if config.ckpt_dir is not None:
        folder = Path(config.ckpt_dir).expanduser()
    elif not set(list_file_settings(plan.task)) <= set(given_files):
        # it may have to be downloaded, which has no time limit
        first_folder = find_folder() if groups.local_rank == 0 else None
        groups.coordinator.gather(None, "find the checkpoint, or download it")
        folder = find_folder() if first_folder is None else first_folder
    checkpoint = open_checkpoint(
        folder,
        plan.task,
        getattr(torch, config.dtype),
        given_files=given_files,
        loras=list_loras(config),
        allow_unmatched=config.lora_unmatched == "allow",
    )
    log_loras(checkpoint.loras)
    return checkpoint


def _prepare_attention(
    requested_kernel: str, device: torch.device, dtype: torch.dtype, dims: TransformerDims
) -> Callable[[], InnerAttention]:
    """Return a function that chooses the attention kernel, and start to compile kernels in a thread.

    The compilation runs while texts are encoded; the function waits for it. Raises InputError at once if a
    kernel requested by name does not work here.
    """

    def choose_kernel() -> InnerAttention:
        return choose_attention(
            requested_kernel, device=device, dtype=dtype, head_dim=dims.head_dim
        )

    kernel = choose_kernel() if requested_kernel != "auto" or device.type != "cuda" else None
    if kernel is not None and device.type != "cuda":
        return lambda: kernel

    def compile_kernels() -> None:
        torch.cuda.set_device(device)  # a thread's own is the first GPU
        transformer_ops.compile_kernels(device, dims.dim)
        cross_attention.compile_kernels(device, dims.head_dim)
        if dims.trained_attention is not None:
            block_sparse.compile_kernels(device, dtype, dims)
        if kernel is None:
            compile_attention(device=device, dtype=dtype, head_dim=dims.head_dim)

    executor = ThreadPoolExecutor(1)
    compilation = executor.submit(compile_kernels)
    executor.shutdown(wait=False)

    def get_attention() -> InnerAttention:
        compilation.result()
        return kernel if kernel is not None else choose_kernel()

    return get_attention
