"""Fault-injection drill: a run with jobs under faults, compared with an undisturbed run.

    python -m bench.drill     # 1000 jobs, 4 ranks on CPUs, 60 faults: about an hour on 2 cores
    python -m bench.drill --jobs 12 --ranks 2 --faults 4
    python -m bench.drill --jobs 12 --ranks 2 --steps 10 --kinds SIGINT "power cut"    # each once, in order

The faults are in bench/faults.py: a rank or the launcher is killed, stopped or gets a signal, the disk is
full, other runs start in the same folder, files are damaged, an image vanishes, the file of jobs is edited,
fsync fails or has no effect before a power cut. After each the same command is started again, and resumes.

In the end every job of the file, as it is then, must have one complete video, equal to that of the
undisturbed run, and no job may have been made twice unless its line was edited or its files were lost. The
disk is a small tmpfs, which only root can mount; faults that need that, or a C compiler, are left out where
there is none.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from bench.faults import BETWEEN_RUNS, FAULTS, NEED_FSYNC, Fsync, Run, build_fsync, kill_all
from bench.record import this_run
from wan_dist.output.record import DONE, VideoRecord
from wan_dist.runtime.file_hash import hash_file

_ROOT = Path(__file__).parents[1]
_COMMON = ["task=toy", "dtype=float32", "size=64x48", "frame_num=9", "parallel.timeout=15"]
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ENDS = {0, 1, 75, *(-number for number in _SIGNALS), *(128 + number for number in _SIGNALS)}
"""Exit codes that a run under faults may have: done, failed, preempted, or a signal's."""
_EACH_IMAGE = 4
"""One in this many jobs has an image."""
_MOST_RUNS = 5
"""Runs after the last fault within which the remaining jobs have to be made."""

Line = dict[str, Any]
StartProcess = Callable[[Sequence[str], Mapping[str, str], Path], Run]
"""Starts a run from its interpreter's arguments, additional variables and log."""


def start_interpreter(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Run:
    """Start an interpreter with these arguments and additional variables; append its output to ``log``."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=_ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=file,
        )


@dataclass
class Drill:
    """A drill in ``folder``, which has the file of jobs, events and the log; results go to ``disk``."""

    folder: Path
    disk: Path
    num_jobs: int
    num_ranks: int
    plan: Sequence[str]
    """Names of the faults, in order."""
    chance: random.Random
    fsync: Fsync | None = None
    codes: Counter[str] = field(default_factory=Counter)
    """Number of runs by exit code."""
    found: list[str] = field(default_factory=list)
    """Violations that were found."""
    notes: list[str] = field(default_factory=list)
    """Faults that were left out, and why."""
    runs: list[Run] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)
    """Prompts for each of which two single runs have made a video."""
    made_again: Counter[str] = field(default_factory=Counter)
    """Number of times that a job may be made again."""
    edited: set[str] = field(default_factory=set)
    """Names of the jobs whose line was edited."""
    num_cuts: int = 0
    """Power cuts so far."""
    num_begun: int = 0
    """Jobs that were started before the last run was."""
    num_steps: int = 30
    num_replicas: int | None = None
    """Number of replicas that the ranks are divided into.

    None: each rank is one, so that a run without torchrun makes the same videos, bit-identical.
    """

    start_process: StartProcess = start_interpreter
    start_seconds: float = 8.0
    """Longest time from a start to a fault: long enough that some are injected before the first step."""

    def __post_init__(self) -> None:
        self.lines = [self._line(number) for number in range(self.num_jobs)]
        self._write()

    def _line(self, number: int) -> Line:
        line: Line = {"name": f"job-{number:04}", "prompt": f"a ball, {number}", "seed": number}
        if number % _EACH_IMAGE == 0:
            line["image"] = str(self.folder / f"image-{number:04}.png")
            Image.new("RGB", (64, 48), (number % 256, number * 7 % 256, 100)).save(line["image"])
        return line

    def _write(self) -> None:
        (self.folder / "jobs.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in self.lines)
        )

    def edit(self) -> list[str]:
        """Change the fps of a line whose video is done, if one is, and another line's prompt, and add a line.

        Returns the names of the changed lines.
        """
        done = set(self.events(self.disk, "done"))
        lines = [line for line in self.lines if line["name"] not in self.edited]
        self.chance.shuffle(lines)
        lines.sort(key=lambda line: line["name"] not in done)  # stable
        changed = lines[:1] + lines[-1:] if len(lines) > 1 else []
        if changed:
            changed[0]["fps"] = 7
            changed[1]["prompt"] += ", changed"
        self.lines.append(self._line(len(self.lines)))
        self._write()
        names = [line["name"] for line in changed]
        self.edited.update(names)
        return names

    def run_alone(self, folder: Path) -> None:
        """Run the jobs of the file, as it is in the end, without faults."""
        if code := self.start(folder).wait():
            raise SystemExit(f"the run without faults ended with code {code}")

    def start(self, out: Path, *more: str, launched: bool = True) -> Run:
        """Start a run of the jobs; its events go to a file of the folder's name."""
        jobs, events = self.folder / "jobs.jsonl", self.folder / f"{out.name}.jsonl"
        self.num_begun = len(self.events(out, "begun"))
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={self.num_ranks}",
        ]
        settings = [
            *_COMMON,
            f"sample.steps={self.num_steps}",
            f"jobs={jobs}",
            f"output.dir={out}",
            f"output.events={events}",
            *more,
        ]
        settings += [f"parallel.dp={self.num_replicas}"] if self.num_replicas is not None else []
        return self._start([*(torchrun if launched else []), "-m", "wan_dist.run", *settings])

    def start_single(self, prompt: str, *, num_steps: int) -> Run:
        """Start a run of one video, whose name is generated."""
        settings = [
            *_COMMON,
            f"sample.steps={num_steps}",
            f"prompt={prompt}",
            f"output.dir={self.disk}",
        ]
        return self._start(["-m", "wan_dist.run", *settings])

    def _start(self, command: list[str]) -> Run:
        environment = {"OMP_NUM_THREADS": "1"} | (self.fsync.environment if self.fsync else {})
        log = self.folder / "log.txt"
        with log.open("a") as file:
            file.write(f"---- {time.strftime('%H:%M:%S')} {' '.join(command[:6])}\n")
        run = self.start_process(command, environment, log)
        self.runs.append(run)
        return run

    def events(self, out: Path, kind: str) -> list[str]:
        """Return the job names of the events of a kind, in the order of the file."""
        try:
            lines = (self.folder / f"{out.name}.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [entry["job"] for line in lines if (entry := json.loads(line))["event"] == kind]

    def allow_again(self, name: str) -> None:
        """Allow a job that is done to be made once more."""
        if name in self.events(self.disk, "done"):
            self.made_again[name] += 1

    def inject(self) -> None:
        """Inject the faults, then run until all jobs are done, for at most five runs."""
        run = self.start(self.disk)
        for number, (kind, after) in enumerate(itertools.zip_longest(self.plan, self.plan[1:])):
            num_done = len(set(self.events(self.disk, "done")))
            share = max(0, self.num_jobs - num_done) / (len(self.plan) - number + 1)
            self._await(run, num_done + round(self.chance.uniform(0, 1.5 * share)))
            if run.poll() is not None and kind not in BETWEEN_RUNS:
                run = self._again(run)
                time.sleep(self.chance.uniform(0, self.start_seconds))  # also while it starts
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"---- {time.strftime('%H:%M:%S')} fault: {kind}\n")
            FAULTS[kind](self, run)
            if run.poll() is not None and after not in BETWEEN_RUNS:
                run = self._again(run)
        # The second run of that fault may have taken jobs, which this run left to it.
        is_done = self._end_of(run) == 0 and "a second run" not in self.plan
        for _ in range(0 if is_done else _MOST_RUNS):
            if self._end_of(self.start(self.disk, "retry_failed=true")) == 0:
                break

    def _again(self, run: Run) -> Run:
        """Start the same command again after a run has ended."""
        self._end_of(run)
        return self.start(self.disk)

    def _await(self, run: Run, num_done: int) -> None:
        while run.poll() is None and len(set(self.events(self.disk, "done"))) < num_done:
            time.sleep(0.1)

    def _end_of(self, run: Run) -> int:
        code = run.wait(timeout=1800)
        self.codes[str(code)] += 1
        if code not in _ENDS:
            raise SystemExit(f"a run ended with code {code}")
        return code

    def compare(self, alone: Path) -> None:
        """Record the violations, compared with the results of the undisturbed run."""
        for job, count in Counter(self.events(self.disk, "done")).items():
            if count > 1 + self.made_again[job]:
                self.found.append(
                    f"{job} was made {count} times, and {1 + self.made_again[job]} would do"
                )
        videos = set()
        for line in self.lines:
            videos.add(f"{line['name']}.mp4")
            try:
                text = (self.disk / f"{line['name']}.json").read_text()
                record = VideoRecord.from_json(json.loads(text))
                digests = {
                    hash_file(folder / f"{line['name']}.mp4") for folder in (self.disk, alone)
                }
            except (OSError, ValueError) as error:
                self.found.append(f"{line['name']}: {error}")
                continue
            if record.status != DONE or {record.video_digest} != digests:
                self.found.append(f"{line['name']} is {record.status}, and not the same video")
        videos |= self._compare_pairs()
        unknown = {file.name for file in self.disk.glob("*.mp4")} - videos
        names = [file.name for file in self.disk.iterdir()]
        # A check that is killed leaves its test video, which a later check removes.
        leftovers = [name for name in names if "partial" in name and "probe" not in name]
        # An edited line may leave the state of what it was.
        leftovers += [
            name
            for name in names
            if name.endswith(".state.safetensors") and name.partition(".")[0] not in self.edited
        ]
        self.found += [f"{name} should not be there" for name in sorted([*unknown, *leftovers])]

    def _compare_pairs(self) -> set[str]:
        """Return the videos of single runs, and record the prompts that have not two."""
        records = [
            VideoRecord.from_json(json.loads(file.read_text()))
            for file in self.disk.glob("toy_*.json")
        ]
        videos = {record.prompt: set() for record in records}
        for record in records:
            file = Path(record.file or "")
            if file.is_file() and hash_file(file) == record.video_digest:
                videos[record.prompt].add(file.name)
        for prompt in self.pairs:
            if (number := len(videos.get(prompt, ()))) != 2:
                self.found.append(
                    f"two single runs of {prompt!r} left {number} whole videos with a record"
                )
        return {name for names in videos.values() for name in names}

    def close(self) -> None:
        """Kill the runs that have not ended."""
        for run in self.runs:
            if run.poll() is None:
                kill_all(run)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Yield a folder on a tmpfs of ``size`` bytes, or a plain folder where it cannot be mounted."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        yield folder / "out"
        return
    try:
        (place / "out").mkdir()
        yield place / "out"
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def choose_faults(number: int, kinds: Sequence[str], chance: random.Random) -> list[str]:
    """Return ``number`` faults in random order, as many of each kind."""
    plan = [kinds[place % len(kinds)] for place in range(number)]
    chance.shuffle(plan)
    return plan


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--replicas",
        type=int,
        help="into which the ranks are divided, fewer than them: then they share each video's work",
    )
    parser.add_argument(
        "--faults", type=int, help="how many, in any order; 60, or each of --kinds once"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(FAULTS),
        metavar="KIND",
        help="faults of these kinds: " + ", ".join(FAULTS),
    )
    parser.add_argument("--steps", type=int, default=30, help="of a job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of what was found")
    return parser.parse_args()


def make_drill(
    options: argparse.Namespace, folder: Path, disk: Path, chance: random.Random
) -> Drill:
    """Return the drill of these options, with a note for each fault that this machine cannot inject."""
    fsync = build_fsync(folder)
    missing = set(NEED_FSYNC if fsync is None else ())
    if disk.parent == folder:
        missing.add("full disk")
    kinds = [kind for kind in options.kinds or FAULTS if kind not in missing]
    if options.kinds and options.faults is None:
        plan = kinds
    else:
        plan = choose_faults(options.faults or 60, kinds, chance)
    drill = Drill(
        *(folder, disk, options.jobs, options.ranks, plan, chance, fsync),
        num_steps=options.steps,
        num_replicas=options.replicas,
    )
    drill.notes += [
        f"no {kind}: it needs {'a C compiler' if kind in NEED_FSYNC else 'root'}"
        for kind in sorted(missing)
    ]
    return drill


def run_drill(drill: Drill) -> tuple[float, float]:
    """Run with faults, run alone, compare; returns the seconds under faults, and alone.

    The log is copied to drill-log.txt if there are violations or an exception is raised.
    """
    folder = drill.folder
    started = time.perf_counter()
    try:
        drill.inject()
        under_faults = time.perf_counter() - started
        drill.run_alone(folder / "alone")
        alone = time.perf_counter() - started - under_faults
        drill.compare(folder / "alone")
    finally:
        drill.close()
        if drill.found or sys.exc_info()[0] is not None:
            shutil.copy(folder / "log.txt", "drill-log.txt")
    return under_faults, alone


def main(start_process: StartProcess = start_interpreter, start_seconds: float = 8.0) -> None:
    """Run the drill and print what was found; exit code 1 if there are violations."""
    options = parse_arguments()
    with (
        tempfile.TemporaryDirectory() as name,
        small_disk(Path(name), options.jobs * 2**18 + 2**24) as disk,
    ):
        drill = make_drill(options, Path(name), disk, random.Random(options.seed))
        drill.start_process, drill.start_seconds = start_process, start_seconds
        under_faults, alone = run_drill(drill)
        failures = drill.fsync.num_failures if drill.fsync else 0
    found = {
        "jobs": options.jobs,
        "ranks": options.ranks,
        "replicas": options.replicas,
        "faults": dict(Counter(drill.plan)),
    }
    found |= {
        "ends": dict(drill.codes),
        "found": drill.found,
        "notes": drill.notes,
        "failed_fsyncs": failures,
    }
    found |= {"seconds_alone": round(alone, 1), "seconds_under_faults": round(under_faults, 1)}
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found | this_run(), indent=2) + "\n")
    raise SystemExit(1 if drill.found else 0)


if __name__ == "__main__":
    main()
