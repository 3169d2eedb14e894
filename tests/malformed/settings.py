"""Settings on the command line that nobody should give, and some that look wrong and are not."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.malformed.case import RUN, Case, accepted, setting

HUGE = str(10**30)


def _with(
    name: str,
    settings: str,
    says: str | tuple[str, ...],
    *,
    link: str = "",
    file: str = "",
    pipe: str = "",
) -> Case:
    """Return the case of settings that must be refused where a link, a file or a pipe is in the way."""

    def make(folder: Path) -> Sequence[str]:
        if link:
            (folder / link).symlink_to("nowhere/at/all")
        if file:
            (folder / file).write_text("in the way")
        if pipe:
            os.mkfifo(folder / pipe)
        return [*RUN, settings]

    return Case(name, make, says if isinstance(says, tuple) else (says,))


def _of(folder: str, name: str) -> Callable[[object, Path], None]:
    def check(_: object, outputs: Path) -> None:
        names = sorted(path.name for path in (outputs / folder).glob("[!.]*"))
        assert names == [f"{name}.json", f"{name}.latents.safetensors", f"{name}.mp4"]

    return check


KEYS = [
    setting("promt=x", says=("unknown key 'promt'", "did you mean 'prompt'?")),
    setting("cats", says="'cats' is not key=value"),
    setting("=", says="unknown key ''"),
    setting("--frobnicate", says="unknown flag --frobnicate"),
    setting("--multirun", "jobs=list.txt", says="jobs=FILE and --multirun"),
    setting("--multirun", "sede=1,2", says=("unknown key 'sede'", "did you mean 'seed'?")),
    setting("--multirun", "seed=[1,2", says="seed=[1,2"),
    setting("--multirun", "parallel.cfg=1,2", says="parallel.cfg applies to the whole run"),
    setting("-m", "seed=range(0,1000)", "sample.steps=range(1,1000)", says="combinations"),
    setting("+new.key=5", says="unknown key 'new.key'"),
    setting("~prompt", says="'~prompt'"),
    setting("~task", says="'~task'"),
    setting("~sample", says="'~sample'"),
    setting("~nothing", says="'~nothing'"),
    setting("hydra.run.dir=elsewhere", says="unknown key 'hydra.run.dir'"),
    setting(
        "hydra.sweep.dir=elsewhere", "hydra.mode=MULTIRUN", says="unknown key 'hydra.sweep.dir'"
    ),
    setting(
        "+hydra.callbacks.x._target_=os.system", says="unknown key 'hydra.callbacks.x._target_'"
    ),
    setting("hydra/job_logging=default", says="unknown key 'hydra/job_logging'"),
    setting("task@other=toy", says="unknown key 'task@other'"),
    setting("task=../task/toy", says="there is no task '../task/toy'"),
    setting("task=toy.yaml", says=("task=toy.yaml: cannot read the file",)),
    setting("task=", says="there is no task ''"),
    setting("memory=lots", says="memory"),
    setting("sample=5", says="sample"),
    setting("sample=null", says="sample"),
    setting("output=[]", says="output"),
    setting("sample={steps:3,cats:4}", says="cats"),
    setting("seed.deep=5", says="unknown key 'seed.deep'"),
    setting("\x1b[2Jseed=5", says="unknown key '\\x1b[2Jseed'", name="an escape code in a key"),
    setting("se\u202eed=5", says="unknown key", name="a key that reads backwards"),
]

NUMBERS = [
    setting("seed=-2", says="seed=-2 must be 0 or larger"),
    setting("seed=x", says="seed"),
    setting("seed=", says="seed"),
    setting("seed=true", says="seed"),
    setting("seed=1,2", says=("seed=1,2", "one value")),
    setting(f"seed={2**64}", says=(f"seed={2**64}", "2^64 - 1")),
    setting(f"seed={HUGE}", says="2^64 - 1"),
    setting("frame_num=10", says=("frame_num=10 is not 4n + 1", "9 and 13")),
    setting("frame_num=0", says="frame_num=0 is not 4n + 1"),
    setting(f"frame_num={4 * 10**9 + 1}", says=f"frame_num={4 * 10**9 + 1}"),
    setting(f"frame_num={4 * 10**30 + 1}", says="frame_num="),
    setting("fps=0", says="fps=0 must be at least 1"),
    setting(f"fps={HUGE}", says="fps="),
    setting("sample.steps=0", says="sample.steps=0 must be at least 1"),
    setting("sample.steps=1000000000", says=("sample.steps=1000000000", "1000")),
    setting("sample.shift=0", says="sample.shift=0.0 must be above 0"),
    setting("sample.shift=nan", says=("sample.shift=nan", "finite")),
    setting("sample.shift=inf", says=("sample.shift=inf", "finite")),
    setting("sample.shift=1e400", says=("sample.shift=inf", "finite")),
    setting("sample.shift=three", says="sample.shift"),
    setting("sample.guide_scale=nan", says=("sample.guide_scale=nan", "finite")),
    setting("sample.guide_scale=[3.0,-inf]", says=("sample.guide_scale=[3.0, -inf]", "finite")),
    setting("sample.guide_scale=1e400", says=("sample.guide_scale=inf", "finite")),
    setting(f"sample.guide_scale={'9' * 400}", says="sample.guide_scale"),
    setting("sample.guide_scale=[3.0]", says="is neither a number nor [low, high]"),
    setting("sample.guide_scale=[1,2,3]", says="is neither a number nor [low, high]"),
    setting("sample.guide_scale=[3.0,4.0]", says="toy has one transformer and needs one number"),
    setting("sample.guide_scale=strong", says="is neither a number nor [low, high]"),
    setting("sample.guide_scale=null", says="is neither a number nor [low, high]"),
    setting(
        "sample.solver=eular", says=("sample.solver=eular is not one of", "did you mean 'euler'?")
    ),
    setting("cache.size_gib=nan", says=("cache.size_gib=nan", "finite")),
    setting("cache.size_gib=1e400", says=("cache.size_gib=inf", "finite")),
    setting("cache.threshold=nan", "cache.steps=easy", says=("cache.threshold=nan", "finite")),
    setting("parallel.timeout=nan", says=("parallel.timeout=nan", "finite")),
    setting("parallel.timeout=1e300", says="parallel.timeout=1e+300"),
    setting("parallel.load_timeout=inf", says=("parallel.load_timeout=inf", "finite")),
    setting("memory.host_budget_gib=nan", says=("memory.host_budget_gib=nan", "finite")),
    setting(
        "memory.host_budget_gib=1e-9", says="of which 0.0 can be used (memory.host_budget_gib)"
    ),
    setting("memory.slice_tokens=0", says="memory.slice_tokens=0 must be at least 1"),
    setting("parallel.dp=0", says="parallel.dp"),
    setting(f"parallel.ulysses={HUGE}", says="parallel.ulysses"),
]

SIZES = [
    setting("size=0*0", says="size=0*0 is not WIDTHxHEIGHT"),
    setting("size=00*16", says="size=00*16 is not WIDTHxHEIGHT"),
    setting("size=10x", says="size=10x is not WIDTHxHEIGHT"),
    setting("size=", says="size= is not WIDTHxHEIGHT"),
    setting("size=-32*16", says="size=-32*16 is not WIDTHxHEIGHT"),
    setting("size=32*16*8", says="size=32*16*8 is not WIDTHxHEIGHT"),
    setting("size=1e3*16", says="size=1e3*16 is not WIDTHxHEIGHT"),
    setting("size=33*16", says=("size=33x16", "32x16 and 48x16")),
    setting("size=1000000000*1000000000", says=("size=1000000000x1000000000", "16384")),
    setting("size=16400*16", says=("size=16400x16", "16384")),
    setting(f"size={'1' * 5000}*16", says="is not WIDTHxHEIGHT"),
    setting("size=${oc.env:HOME}", says="size=${oc.env:HOME} is not WIDTHxHEIGHT"),
    setting("max_area=0", says="max_area=0 must be above 0"),
    setting("max_area=512", says="max_area=512 needs an image"),
    setting("size=３３*16", says="is not WIDTHxHEIGHT"),
]

PLACES = [
    _with(
        "output.dir is a file",
        "output.dir=outputs",
        ("output.dir=outputs cannot be written", "it is a file"),
        file="outputs",
    ),
    _with(
        "output.dir is below a file", "output.dir=x/y", "output.dir=x/y cannot be written", file="x"
    ),
    _with(
        "output.dir is a link to nothing",
        "output.dir=x",
        "output.dir=x cannot be written",
        link="x",
    ),
    _with("output.dir is a pipe", "output.dir=x", "output.dir=x cannot be written", pipe="x"),
    setting("output.dir=/proc/nowhere", says="output.dir=/proc/nowhere cannot be written"),
    setting("output.dir=/dev/null", says="output.dir=/dev/null cannot be written"),
    setting("output.dir=", says="output.dir is empty"),
    setting("output.dir=~nobody-of-this-name/x", says="output.dir=~nobody-of-this-name/x"),
    setting(f"output.dir=outputs/{'x' * 300}", says="cannot be written"),
    setting(
        "output.dir=/proc/\x1b[31mred",
        says="output.dir=/proc/\\x1b[31mred cannot be written",
        name="an escape code in output.dir",
    ),
    setting("output.name=../x", says="output.name='../x' must be a plain file name"),
    setting("output.name=/tmp/x", says="output.name='/tmp/x' must be a plain file name"),
    setting("output.name=..", says="output.name='..' must be a plain file name"),
    setting("output.name=", says="output.name='' must be a plain file name"),
    setting("output.name=.mp4", says="output.name='.mp4' must be a plain file name"),
    setting(
        "output.name=a\nb",
        says="output.name='a\\nb' must be a plain file name",
        name="a line's end in output.name",
    ),
    setting(f"output.name={'x' * 250}", says=("output.name", "250 bytes")),
    setting("ckpt_dir=nowhere", says="ckpt_dir=nowhere is not a folder"),
    setting("ckpt_dir=", says="ckpt_dir"),
    setting("ckpt_dir=~nobody-of-this-name", says="ckpt_dir=~nobody-of-this-name"),
    setting("ckpt_dir=/dev/zero", says="ckpt_dir=/dev/zero is not a folder"),
    setting("ckpt_dir=\udcff", says=("ckpt_dir", "UTF-8"), name="ckpt_dir in Latin-1"),
    setting(
        "ckpt_dir=\x1b]0;title\x07",
        says="ckpt_dir=\\x1b]0;title\\x07 is not a folder",
        name="an escape code in ckpt_dir",
    ),
    _with("ckpt_dir is a file", "ckpt_dir=x", "ckpt_dir=x is a file; give its folder", file="x"),
    _with(
        "dit_file is a text",
        "dit_file=x.safetensors",
        "x.safetensors (10 bytes) has no readable",
        file="x.safetensors",
    ),
    _with(
        "dit_file is a pipe",
        "dit_file=x.safetensors",
        "dit_file=x.safetensors cannot be read: it is not a file",
        pipe="x.safetensors",
    ),
    setting("dit_file=x.pth", says="dit_file=x.pth cannot be read: No such file"),
    setting("dit_file=.", says=("dit_file=. is a folder", "ckpt_dir=FOLDER")),
    setting("dit_file=,", says="dit_file=, cannot be read: No such file"),
    setting("dit_file=a.safetensors,b.safetensors", says="this task takes one, not 2 files"),
    setting("t5_file=x.gguf", says="t5_file=x.gguf cannot be read: No such file"),
    setting("vae_file=.", says=("vae_file=. is a folder", "ckpt_dir=FOLDER")),
    setting("clip_file=x.safetensors", says="clip_file: toy has no image encoder"),
    _with("vae_file is a text", "vae_file=x.pth", "x.pth (10 bytes) cannot be read", file="x.pth"),
    setting("lora=", says="lora is empty"),
    setting("lora=x.safetensors", says="lora=x.safetensors cannot be read: No such file"),
    setting("lora=.", says="lora=."),
    setting("lora=[~nobody-of-this-name/x]", says="the home folder of this user is unknown"),
    _with(
        "lora is a pipe",
        "lora=x.safetensors",
        "lora=x.safetensors cannot be read: it is not a file",
        pipe="x.safetensors",
    ),
    _with(
        "lora is a text",
        "lora=x.safetensors",
        "x.safetensors (10 bytes) has no readable",
        file="x.safetensors",
    ),
    setting("lora_low=x.safetensors", says="this task has one transformer"),
    setting("lora_strength=[]", "lora=x", says="has 0 numbers for 1 file in lora"),
    setting("lora_strength={a:1}", says="lora_strength"),
    setting("last_frame=x.png", says="toy takes image=FILE, or none"),
    accepted(
        "output.name=-pipe:1 %d",
        "output.dir=outputs/\x1b[31mred",
        check=_of("\x1b[31mred", "-pipe:1 %d"),
    ),
]


CASES = [*KEYS, *NUMBERS, *SIZES, *PLACES]
