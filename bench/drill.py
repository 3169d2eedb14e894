"""Beat a run with jobs until it is done, and compare it with one that was left in peace.

    python -m bench.drill                                       # 1000 jobs, 4 ranks on CPUs, 50 blows: half an hour on 2 cores
    python -m bench.drill --jobs 12 --ranks 2 --blows 4

Blows: a rank or the launcher is killed, asked to end, or held for a while, the disk is full, a second run begins on the same folder.
After each the same command is given again. In the end every job has one whole video, equal to that of the undisturbed run, and none
was made twice. The disk is a small tmpfs, which only root can make; without it that blow is left out.
"""

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.record import this_run
from wan_dist.record import digest_of

_ROOT = Path(__file__).parents[1]
_SETTINGS = ["task=toy", "dtype=float32", "size=64*48", "frame_num=9", "sample.steps=30", "parallel.timeout=15"]
_ENDS = (0, 1, 75, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes that a run under blows may have."""
_FILL_BYTES = 2**16


@dataclass
class Drill:
    """One drill in a folder; ``disk`` is where the results go."""

    folder: Path
    disk: Path
    num_jobs: int
    num_ranks: int
    chance: random.Random
    codes: Counter[str] = field(default_factory=Counter)
    """How runs ended."""

    def __post_init__(self) -> None:
        lines = (json.dumps({"name": f"job-{number:04}", "prompt": f"a ball, {number}", "seed": number}) for number in range(self.num_jobs))
        (self.folder / "jobs.jsonl").write_text("\n".join(lines) + "\n")

    def begin(self, out: Path, *, launched: bool = True, num_ranks: int | None = None) -> subprocess.Popen[bytes]:
        """Start a run; its events go to ``events.jsonl``."""
        settings = [*_SETTINGS, f"jobs={self.folder / 'jobs.jsonl'}", f"output.dir={out}", f"output.events={self.folder}/{out.name}.jsonl"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks or self.num_ranks}"]
        command = [sys.executable, "-W", "ignore", *(torchrun if launched else []), "-m", "wan_dist.run", *settings]
        log = (self.folder / "log.txt").open("ab")
        with log:
            return subprocess.Popen(command, cwd=_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)

    def events(self, out: Path, kind: str) -> list[str]:
        """Return the jobs of events of a kind."""
        try:
            lines = (self.folder / f"{out.name}.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [entry["job"] for line in lines if (entry := json.loads(line))["event"] == kind]

    def beat(self, num_blows: int) -> Counter[str]:
        """Give blows to runs until there were enough of them, then let one end; returns how many of each kind."""
        given: Counter[str] = Counter()
        kinds = [kind for kind in BLOWS if kind != "full disk" or self.disk != self.folder]
        plan = [kinds[number % len(kinds)] for number in range(num_blows)]
        self.chance.shuffle(plan)
        run = self.begin(self.disk)
        for number, kind in enumerate(plan):
            done = len(self.events(self.disk, "done"))
            share = (self.num_jobs - done) / (num_blows - number + 1)
            self._await(run, done + round(self.chance.uniform(0, 1.5 * share)))
            if run.poll() is not None:
                self.codes[str(self._ended(run))] += 1
                run = self.begin(self.disk)
                time.sleep(self.chance.uniform(0, 12))  # also while it begins
            BLOWS[kind](self, run)
            given[kind] += 1
            if run.poll() is not None:
                self.codes[str(self._ended(run))] += 1
                run = self.begin(self.disk)
        self.codes[str(self._ended(run))] += 1
        for _ in range(5):  # what the last blow has left
            code = self._ended(self.begin(self.disk))
            self.codes[str(code)] += 1
            if code == 0:
                break
        return given

    def _await(self, run: subprocess.Popen[bytes], num_done: int) -> None:
        while run.poll() is None and len(self.events(self.disk, "done")) < num_done:
            time.sleep(0.1)

    def _ended(self, run: subprocess.Popen[bytes]) -> int:
        code = run.wait(timeout=1800)
        if code not in _ENDS:
            raise SystemExit(f"a run ended with code {code}; see {self.folder / 'log.txt'}")
        return code

    def faults(self, peace: Path) -> list[str]:
        """Return what is not as it should be, compared with the results of the undisturbed run."""
        found = [f"{job} was made {count} times" for job, count in Counter(self.events(self.disk, "done")).items() if count > 1]
        for number in range(self.num_jobs):
            name = f"job-{number:04}"
            try:
                record = json.loads((self.disk / f"{name}.json").read_text())
                digests = {digest_of(folder / f"{name}.mp4") for folder in (self.disk, peace)}
            except (OSError, ValueError) as fault:
                found.append(f"{name}: {fault}")
                continue
            if record["status"] != "done" or {record["video_digest"]} != digests:
                found.append(f"{name} is {record['status']}, and not the same video")
        unknown = {file.name for file in self.disk.glob("*.mp4")} - {f"job-{number:04}.mp4" for number in range(self.num_jobs)}
        leftovers = [file.name for file in self.disk.iterdir() if "partial" in file.name or file.name.endswith(".state.safetensors")]
        return found + [f"{name} should not be there" for name in sorted([*unknown, *leftovers])]


def _ranks_of(run: subprocess.Popen[bytes]) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in told.split()]


def _signal(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return  # it has ended by itself


def kill_rank(drill: Drill, run: subprocess.Popen[bytes]) -> None:
    """End a rank at once."""
    if ranks := _ranks_of(run):
        _signal(drill.chance.choice(ranks), signal.SIGKILL)
    run.wait(timeout=120)


def kill_launcher(drill: Drill, run: subprocess.Popen[bytes]) -> None:
    """End torchrun at once."""
    ranks = _ranks_of(run)
    _signal(run.pid, signal.SIGKILL)
    run.wait(timeout=120)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # they end by themselves
        if time.monotonic() > until:
            raise SystemExit("ranks outlive their launcher")
        time.sleep(0.1)


def ask(drill: Drill, run: subprocess.Popen[bytes]) -> None:
    """Ask the launcher to end, as Slurm does."""
    _signal(run.pid, signal.SIGTERM)
    run.wait(timeout=120)


def hold(drill: Drill, run: subprocess.Popen[bytes]) -> None:
    """Hold a rank for a few seconds."""
    if ranks := _ranks_of(run):
        rank = drill.chance.choice(ranks)
        _signal(rank, signal.SIGSTOP)
        time.sleep(drill.chance.uniform(1, 5))
        _signal(rank, signal.SIGCONT)


def fill_disk(drill: Drill, run: subprocess.Popen[bytes]) -> None:
    """Leave no space until the run has ended."""
    filler = drill.disk / ".filler"
    with filler.open("wb", buffering=0) as file:
        while run.poll() is None:  # it writes as well, and files of its own may go meanwhile
            with suppress(OSError):
                file.write(bytes(_FILL_BYTES))
            time.sleep(0.002)
    run.wait()
    filler.unlink()


def run_beside(drill: Drill, run: subprocess.Popen[bytes]) -> None:
    """Give the same command in another terminal, and end that one."""
    other = drill.begin(drill.disk, launched=False)
    time.sleep(drill.chance.uniform(6, 12))
    _signal(other.pid, drill.chance.choice([signal.SIGKILL, signal.SIGTERM]))
    other.wait(timeout=120)


BLOWS = {
    "a rank killed": kill_rank,
    "the launcher killed": kill_launcher,
    "asked to end": ask,
    "a rank held": hold,
    "full disk": fill_disk,
    "a second run": run_beside,
}


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Yield a file system of so many bytes, or the folder where it cannot be made."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        yield folder
        return
    try:
        (place / "out").mkdir()
        yield place / "out"
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def main() -> None:
    """Beat, compare, print what was found; code 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blows", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of what was found")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name), options.jobs * 2**18 + 2**24) as disk:
        drill = Drill(Path(name), disk, options.jobs, options.ranks, random.Random(options.seed))
        begun = time.perf_counter()
        if drill.begin(Path(name) / "peace").wait():
            raise SystemExit((Path(name) / "log.txt").read_text()[-3000:])
        calm = time.perf_counter() - begun
        given = drill.beat(options.blows)
        beaten = time.perf_counter() - begun - calm
        faults = drill.faults(Path(name) / "peace")
        if faults:
            shutil.copy(Path(name) / "log.txt", "drill-log.txt")
    found = {"jobs": options.jobs, "ranks": options.ranks, "blows": dict(given), "ends": dict(drill.codes), "faults": faults}
    found |= {"seconds_in_peace": round(calm, 1), "seconds_under_blows": round(beaten, 1)}
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found | this_run(), indent=2) + "\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
