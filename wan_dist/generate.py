"""One job, in call order: encode text and images, denoise, keep the latents, decode, write, record."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from wan_dist import vae
from wan_dist.config import RunConfig
from wan_dist.dims import TransformerDims
from wan_dist.encode import encode
from wan_dist.errors import InputError
from wan_dist.experts import Experts
from wan_dist.footprint import table
from wan_dist.hardware import Hardware, find_host
from wan_dist.kept import Kept, Progress
from wan_dist.log import keep_log, logger
from wan_dist.memory import first_that_works, free_bytes, free_memory
from wan_dist.models import cross_attention, transformer_elementwise
from wan_dist.models.attention import InnerAttention, choose_attention, compile_attention
from wan_dist.models.text_encoder import token_ids
from wan_dist.parallel.agreement import Agreeing, is_any
from wan_dist.parallel.collectives import broadcast, broadcast_object, first_on_each_node, gather_objects, name_those_awaited
from wan_dist.parallel.mesh import Groups, limit_waiting, local_device, open_groups
from wan_dist.parallel.usp import check_usp
from wan_dist.plan import Plan, arranged
from wan_dist.preemption import Preempted, preemption
from wan_dist.report import Report
from wan_dist.sampling.conditioning import initial_noise
from wan_dist.sampling.denoise import denoise
from wan_dist.sampling.solvers import make_solver
from wan_dist.toy import toy_checkpoint
from wan_dist.vae import float32_frames, uint8_frames
from wan_dist.video import check_output, save_image, save_tensors, save_video, to_uint8
from wan_dist.ways import Way
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint
from wan_dist.weights.hub import find_checkpoint


def run_job(config: RunConfig, plan: Plan) -> None:
    """Open the groups of ranks and run one job in them. Raises what `generate` raises."""
    device = _device(config)
    # TensorFloat-32 keeps 10 bits of a float32 product: fine beside bfloat16, not where float32 was asked for.
    torch.backends.cudnn.allow_tf32 = config.dtype != "float32"
    with open_groups(plan.degrees, device, timeout=config.parallel.timeout) as groups:
        seed, name = broadcast_object((plan.seed, plan.name), groups.replica)  # a drawn seed is the first rank's
        if plan.degrees.num_ranks > 1:
            keep_log(Path(config.output.dir).expanduser() / "logs" / name)
        generate(config, replace(plan, seed=seed, name=name), groups, device)


def _arranged(plan: Plan, config: RunConfig, checkpoint: Checkpoint, groups: Groups, device: torch.device) -> Plan:
    """Return the plan with the arrangement for the memory that is there, the same on all ranks, and say so."""
    free = free_bytes(device, groups.replica)
    host, limit = broadcast_object(find_host(), groups.replica)
    hardware = Hardware(free if device.type == "cuda" else None, host, host_limit=limit, has_context=True)
    text_len = checkpoint.transformers[0].dims.text_len
    plan = arranged(plan, config, hardware, checkpoint.models, lambda text: len(token_ids(checkpoint.tokenizer, text, text_len)))
    assert plan.budget is not None
    logger.info("plan      %s", plan.arrangement.words)
    for line in table(plan.uses, plan.budget.gpu, plan.budget.host):
        logger.info("          %s", line)
    return plan


@torch.no_grad()
def generate(config: RunConfig, plan: Plan, groups: Groups, device: torch.device) -> Path | None:
    """Run one job; the first rank decodes and writes, and returns the video's (or image's) path.

    Raises InputError for what is wrong with checkpoint or output folder, before weights are read. If decoding or writing fails, the
    latents are on disk and the error says how to go on from them.
    """
    logger.info(plan.summary)
    if plan.advice:
        logger.info("note      %s", plan.advice)
    dtype = getattr(torch, config.dtype)
    report = Report(config, device)
    folder = Path(config.output.dir).expanduser()
    with report.stage("check", f"output {folder}"):
        if groups.rank == 0:
            check_output(folder, width=plan.width, height=plan.height, fps=plan.fps)
        checkpoint = _open_checkpoint(config, plan, groups)
        choose = _begin_to_choose(config.attention, device, dtype, checkpoint.transformers[0].dims)
        if config.parallel.usp == "xfuser":
            check_usp(device, choose().name)
    kept = Kept(folder, config, plan)
    plan = _arranged(kept.go_on(groups.replica, device) if config.latents is None else plan, config, checkpoint, groups, device)
    report.facts |= {"checkpoint": str(checkpoint.folder), "degrees": vars(plan.degrees)}
    result = _free_path(folder, plan, fixed=config.output.name is not None)
    file = result.with_suffix(".latents.safetensors") if config.latents is None else Path(config.latents).expanduser()
    if config.latents is None:
        latents = _make_latents(checkpoint, config, plan, choose, groups, report, kept)
        if groups.rank == 0:
            save_tensors(file, {"latents": latents.cpu()})
    else:
        latents = _given_latents(file).to(device)
    try:
        if is_any(preemption.asked_by is not None, groups.replica, device):
            raise Preempted("asked to end: stopped before decoding; the same command goes on from there")
        _decode(checkpoint, config, plan, latents, groups, result, report)
    except Preempted:
        if groups.rank == 0 and config.latents is None:
            kept.write(Progress(config.sample.steps, latents))
        raise
    except BaseException:
        if groups.rank == 0:
            logger.error("the latents are kept; make the video from them with: %s", _resume_command(config, checkpoint, file, result))
        raise
    if groups.rank == 0:
        _finish(config, plan, report, result, file, kept)
    return result if groups.rank == 0 else None


def _given_latents(file: Path) -> Tensor:
    latents = load_file(file)["latents"].float()
    if not torch.isfinite(latents).all():
        raise InputError(f"latents={file} are not finite: the video would be black")
    return latents


def _finish(config: RunConfig, plan: Plan, report: Report, result: Path, latents_file: Path, kept: Kept) -> None:
    """Write the record; what was kept for the case of a failure goes."""
    report.facts |= {"seed": plan.seed, "prompt": plan.prompt, "file": str(result), "arrangement": asdict(plan.arrangement)}
    report.compare(plan.uses, plan.ranks_per_node)
    report.save(result.with_suffix(".json"))
    if config.latents is None:  # others' latents say nothing of what was kept
        kept.remove()
        if not config.output.save_latents:
            latents_file.unlink()
    logger.info("saved     %s", result)


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


def _make_latents(
    checkpoint: Checkpoint, config: RunConfig, plan: Plan, choose: Callable[[], InnerAttention], groups: Groups, report: Report, kept: Kept
) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank; the models are gone from the device then.

    Goes on from the progress that was kept. Raises Preempted when this or another rank was asked to end, after a step.
    """
    start, num_done = kept.progress.latents, kept.progress.num_done
    if start is not None and num_done == config.sample.steps:
        return start
    limit_waiting(groups, config.parallel.load_timeout)
    conditioning = encode(checkpoint, config, plan, groups, report)
    solver = make_solver(config.sample.solver, config.sample.steps, plan.shift)
    if start is None:
        start = initial_noise(plan.latent_shape, seed=plan.seed, noise_device=config.noise_device, device=report.device)
        start = broadcast(start, groups.replica, report.device)
    else:
        solver.go_on(num_done, kept.progress.solver)
    assert start is not None
    start = start.unsqueeze(0)
    attention = choose()
    report.facts["attention"] = attention.name
    logger.info("attention %s (%s)", attention.name, attention.reason)
    if plan.degrees.num_ranks > 1:
        logger.info("ranks     %s, transformer %s", plan.degrees, "sharded" if plan.arrangement.shard_dit else "on every rank")
    experts = Experts(checkpoint, config, plan, attention, groups, report, conditioning, start, solver, num_done, kept.progress.guesses)
    predict = Agreeing(experts.predict(), groups.replica)

    def after_step(num_done: int, latents: Tensor) -> None:
        if is_any(preemption.asked_by is not None, groups.replica, report.device):
            if groups.rank == 0:
                kept.write(Progress(num_done, latents.squeeze(0), solver.state(), experts.state()))
            is_any(True, groups.replica, report.device)  # the first rank has written it: one that ends may have the others ended
            raise Preempted(f"asked to end: stopped after step {num_done} of {len(solver)}; the same command goes on from there")

    with (
        report.stage("denoise", f"{len(solver) - num_done} steps of {config.sample.solver}"),
        preemption.until_asked(),
        logging_redirect_tqdm([logger]),
        name_those_awaited(groups.replica),  # where sharded weights are gathered, which is not done in our collectives
    ):
        bar = _progress_bar if groups.rank == 0 else iter
        known = conditioning.known_latents
        latents = denoise(predict, start, solver, first=num_done, known_latents=known, progress=bar, after_step=after_step)
        if config.cache.steps is not None:
            report.facts["guessed_steps"] = experts.counts["guessed"]
            logger.info("cache     %d of %d steps were guessed", experts.counts["guessed"], len(solver))
        del predict
        free_memory()
    report.other_ranks = gather_objects(report.stages, groups.replica)[1:]
    return latents.squeeze(0)


def _decode(checkpoint: Checkpoint, config: RunConfig, plan: Plan, latents: Tensor, groups: Groups, result: Path, report: Report) -> None:
    """Decode latents (C, T, h, w) and write the result as frames are ready; where memory runs out, again in a way that needs less."""
    if not torch.isfinite(latents).all():
        raise FloatingPointError("the latents are not finite: the video would be black")

    def work(way: Way) -> None:
        if groups.replica.rank != 0 and way.name != "parallel":
            return  # the first rank goes on alone
        stage = report.stage("decode", f"VAE {way}, {plan.frame_num} frame{'' if plan.frame_num == 1 else 's'}")
        with stage, vae.kernels_tried(checkpoint.vae.dims, way):
            model = vae.load(checkpoint, config, way, latents.device)
            chunks = vae.decode(model, latents, float32_frames if config.output.save_tensor else uint8_frames, way, groups.replica)
            if groups.replica.rank == 0:
                _write(chunks, config, plan, result)
            else:
                assert next(chunks, None) is None

    ways = vae.find_ways(config, plan, checkpoint.vae.dims, latents.device, groups.replica)
    if first_that_works(ways, work, "decoding", "the latents are safe, "):
        report.ran_out("decode")


def _write(chunks: Iterator[Tensor], config: RunConfig, plan: Plan, result: Path) -> None:
    """Write frames (n, H, W, 3), uint8, or float32 in [-1, 1] which are kept too."""
    floats: list[Tensor] = []

    def seen() -> Iterator[Tensor]:
        for chunk in chunks:
            if config.output.save_tensor:
                floats.append(chunk.cpu())
            yield to_uint8(chunk)

    if plan.task.still:
        save_image(result, next(seen())[0])
    else:
        save_video(result, seen(), fps=plan.fps, num_frames=plan.frame_num)
    if floats:
        save_tensors(result.with_suffix(".safetensors"), {"video": torch.cat(floats).permute(3, 0, 1, 2).contiguous()})


def _device(config: RunConfig) -> torch.device:
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
    return device


def _open_checkpoint(config: RunConfig, plan: Plan, groups: Groups) -> Checkpoint:
    """Open the checkpoint; what must be made or fetched is so by the first rank of each node."""

    def find() -> Path:
        return toy_checkpoint() if plan.task.name == "toy" else find_checkpoint(plan.task, area=plan.width * plan.height)

    given = [Path(name.strip()).expanduser() for name in (config.dit_file or "").split(",") if name.strip()]
    folder = first_on_each_node(find, groups) if config.ckpt_dir is None else Path(config.ckpt_dir).expanduser()
    return open_checkpoint(folder, plan.task, getattr(torch, config.dtype), transformer_files=given)


def _free_path(folder: Path, plan: Plan, *, fixed: bool) -> Path:
    """Return the result's path: a name the user chose is replaced, one we made up gets a number rather than overwrite."""
    suffix = ".png" if plan.task.still else ".mp4"
    path, number = folder / f"{plan.name}{suffix}", 1
    while not fixed and path.exists():
        number += 1
        path = folder / f"{plan.name}_{number}{suffix}"
    return path


def _resume_command(config: RunConfig, checkpoint: Checkpoint, kept: Path, result: Path) -> str:
    settings = {
        "task": config.task,
        "ckpt_dir": checkpoint.folder,
        "latents": kept,
        "output.dir": result.parent,
        "output.name": result.stem,
        "fps": config.fps,
    }
    return shlex.join(["python", "-m", "wan_dist.run", *(f"{key}={value}" for key, value in settings.items())])


def _progress_bar(steps: range) -> Iterable[int]:
    form = "denoise   {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps, {rate_inv_fmt}, {remaining} left"
    return tqdm(steps, bar_format=form, initial=steps.start, total=steps.stop, mininterval=0.1 if sys.stderr.isatty() else 10.0)
