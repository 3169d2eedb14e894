"""Fault injection of bench/drill.py: the faults, each injected into a run in progress."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bench.drill import Drill

_FILL_BYTES = 2**16
_LIMIT = 120.0
"""Seconds within which a run has to end after a fault that ends it."""


class Run(Protocol):
    """A run's process: torchrun, or the only rank. ``subprocess.Popen`` is one."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    @property
    def returncode(self) -> int | None:
        """Exit code, None before the end is seen by `poll` or `wait`."""
        ...

    def poll(self) -> int | None:
        """Return the exit code, None if the process is alive."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code."""
        ...


@dataclass(frozen=True)
class Fsync:
    """A library for LD_PRELOAD whose fsync fails, or has no effect, as the file ``control`` says.

    Its source is failing_fsync.c.
    """

    library: Path
    control: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that load the library into a run."""
        return {"LD_PRELOAD": str(self.library), "FSYNC_CONTROL": str(self.control)}

    def set_mode(self, mode: str) -> None:
        """Set ``mode``: every second call fails (f), no call has an effect (l), all calls work (empty)."""
        self.control.write_text(mode)

    @property
    def num_failures(self) -> int:
        """Number of calls that failed so far."""
        return len(self._notes("failed"))

    @property
    def synced(self) -> set[int]:
        """Inodes of the files that were synchronized to disk."""
        return set(self._notes("synced"))

    def _notes(self, kind: str) -> list[int]:
        file = self.control.with_name(f"{self.control.name}.{kind}")
        return [int(line) for line in file.read_text().split()] if file.exists() else []


def build_fsync(folder: Path) -> Fsync | None:
    """Return the library, compiled into ``folder``; None where there is no C compiler or it fails."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    library = folder / "failing_fsync.so"
    source = Path(__file__).with_name("failing_fsync.c")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"],
        capture_output=True,
        check=False,
    )
    return Fsync(library, folder / "fsync") if done.returncode == 0 else None


def ranks_of(run: Run) -> list[int]:
    """Return the process ids of a launcher's ranks, which are its children."""
    told = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(word) for word in told.split()]


def send_signal(process: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


def await_end(run: Run, ranks: list[int]) -> None:
    """Wait for a run and its ranks to end; SystemExit if they do not."""
    until = time.monotonic() + _LIMIT
    while run.poll() is None or any(Path(f"/proc/{rank}").exists() for rank in ranks):
        if time.monotonic() > until:
            raise SystemExit(f"after {_LIMIT:.0f} s a run has not ended")
        time.sleep(0.1)


def kill_all(run: Run) -> None:
    """Kill the launcher and its ranks (SIGKILL)."""
    ranks = ranks_of(run)
    for process in (run.pid, *ranks):
        send_signal(process, signal.SIGKILL)
    await_end(run, ranks)


def kill_rank(drill: "Drill", run: Run) -> None:
    """Kill a rank (SIGKILL)."""
    ranks = ranks_of(run)
    if ranks:
        send_signal(drill.chance.choice(ranks), signal.SIGKILL)
        await_end(run, ranks)


def kill_launcher(drill: "Drill", run: Run) -> None:
    """Kill torchrun (SIGKILL); its ranks end by themselves."""
    ranks = ranks_of(run)
    send_signal(run.pid, signal.SIGKILL)
    await_end(run, ranks)


def terminate(drill: "Drill", run: Run) -> None:
    """Terminate the launcher (SIGTERM), as Slurm does, unless it has ended."""
    if run.poll() is None:
        ranks = ranks_of(run)
        send_signal(run.pid, signal.SIGTERM)
        await_end(run, ranks)


def interrupt(number: signal.Signals) -> Callable[["Drill", Run], None]:
    """Return the fault of sending this signal to the launcher or to a rank."""

    def inject(drill: "Drill", run: Run) -> None:
        ranks = ranks_of(run)
        send_signal(drill.chance.choice([run.pid, *ranks]), number)
        await_end(run, ranks)

    return inject


def stop_rank(drill: "Drill", run: Run) -> None:
    """Stop a rank for a few seconds (SIGSTOP, SIGCONT)."""
    if ranks := ranks_of(run):
        rank = drill.chance.choice(ranks)
        send_signal(rank, signal.SIGSTOP)
        time.sleep(drill.chance.uniform(1, 5))
        send_signal(rank, signal.SIGCONT)


def fill_disk(drill: "Drill", run: Run) -> None:
    """Fill the disk until the run has ended."""
    filler = drill.disk / ".filler"
    with filler.open("wb", buffering=0) as file:
        while run.poll() is None:  # it writes as well, and files of its own may go meanwhile
            with suppress(OSError):
                file.write(bytes(_FILL_BYTES))
            time.sleep(0.002)
    filler.unlink()


def run_beside(drill: "Drill", run: Run) -> None:
    """Start the same command a second time beside the run, and end the second one."""
    other = drill.start(drill.disk, launched=drill.num_replicas is not None)
    time.sleep(drill.start_seconds * drill.chance.uniform(0.75, 1.5))
    ranks = ranks_of(other)
    send_signal(other.pid, drill.chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    await_end(other, ranks)


def run_pair(drill: "Drill", run: Run) -> None:
    """Make two single videos beside the run, whose generated names would be the same."""
    prompt = f"two at once, {len(drill.pairs)}"
    drill.pairs.append(prompt)
    singles = [drill.start_single(prompt, num_steps=steps) for steps in (3, 4)]
    for single in singles:
        await_end(single, [])
        if single.returncode:
            drill.found.append(f"a single run, {prompt!r}, ended with code {single.returncode}")


def damage_files(drill: "Drill", run: Run) -> None:
    """Damage a saved state, if there is one, a video's latents and a record between two runs."""
    terminate(drill, run)
    for pattern in ("*.state.safetensors", "*.latents.safetensors", "job-*.json"):
        if files := sorted(drill.disk.glob(pattern)):
            file = drill.chance.choice(files)
            damage(file, drill.chance)
            if file.suffix == ".json":
                drill.allow_again(file.stem)


def damage(file: Path, chance: Random) -> None:
    """Empty a file, truncate it to half, or overwrite its first bytes."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        manner = chance.choice(("empty", "short", "overwritten"))
        if manner == "overwritten":
            opened.write(chance.randbytes(min(64, size)))
        else:
            opened.truncate(0 if manner == "empty" else size // 2)


def vanish_image(drill: "Drill", run: Run) -> None:
    """Move the image of a pending job away until the run has come to that job, or has ended.

    Only after the run has checked its jobs, since before that a missing image is invalid input.
    """
    while run.poll() is None and len(drill.events(drill.disk, "begun")) == drill.num_begun:
        time.sleep(0.1)
    seen = {*drill.events(drill.disk, "done"), *drill.events(drill.disk, "failed")}
    coming = [line for line in drill.lines if "image" in line and line["name"] not in seen]
    if not coming:
        drill.notes.append("an image was to vanish when no job with one was left")
        return
    line = coming[min(1, len(coming) - 1)]  # the first of them may be in work
    image, aside = Path(line["image"]), Path(line["image"] + ".aside")
    image.rename(aside)
    until = time.monotonic() + _LIMIT
    while run.poll() is None and time.monotonic() < until:
        if line["name"] in (*drill.events(drill.disk, "done"), *drill.events(drill.disk, "failed")):
            break
        time.sleep(0.1)
    aside.rename(image)
    if run.poll() not in (None, 0) and line["name"] not in drill.events(drill.disk, "failed"):
        drill.found.append(
            f"the image of {line['name']} vanished, and the run ended with code {run.returncode}"
        )


def edit_jobs(drill: "Drill", run: Run) -> None:
    """Edit the file of jobs between two runs.

    The fps of a line that is done and the prompt of another are changed, and a line is added.
    """
    terminate(drill, run)
    for name in drill.edit():
        drill.allow_again(name)


def fail_fsync(drill: "Drill", run: Run) -> None:
    """Let every second fsync fail, until three have failed."""
    assert drill.fsync is not None
    before, until = drill.fsync.num_failures, time.monotonic() + _LIMIT
    drill.fsync.set_mode("f")
    while run.poll() is None and drill.fsync.num_failures < before + 3 and time.monotonic() < until:
        time.sleep(0.1)
    drill.fsync.set_mode("")


def cut_power(drill: "Drill", run: Run) -> None:
    """Kill all processes, and empty the files of the last seconds that were not synchronized to disk.

    Every other time all of those files, since fsync had no effect; else every job reported as done must be
    there.
    """
    assert drill.fsync is not None
    is_lying = drill.num_cuts % 2 == 1
    drill.num_cuts += 1
    since = time.time()
    drill.fsync.set_mode("l" if is_lying else "")
    time.sleep(drill.chance.uniform(1, 5))
    kill_all(run)
    drill.fsync.set_mode("")
    synced = drill.fsync.synced
    for file in drill.disk.rglob("*"):
        if not file.is_file() or file.is_symlink() or file.name == ".filler":
            continue
        facts = file.stat()
        if facts.st_mtime >= since and facts.st_size and (is_lying or facts.st_ino not in synced):
            os.truncate(file, 0)
            if is_lying:
                drill.allow_again(file.name.partition(".")[0])


FAULTS: dict[str, Callable[["Drill", Run], None]] = {
    "a rank killed": kill_rank,
    "the launcher killed": kill_launcher,
    "SIGTERM": terminate,
    "SIGHUP": interrupt(signal.SIGHUP),
    "SIGINT": interrupt(signal.SIGINT),
    "a rank stopped": stop_rank,
    "full disk": fill_disk,
    "a second run": run_beside,
    "two single runs": run_pair,
    "damaged files": damage_files,
    "a vanished image": vanish_image,
    "edited jobs": edit_jobs,
    "failing fsync": fail_fsync,
    "power cut": cut_power,
}
BETWEEN_RUNS = ("damaged files", "edited jobs")
"""Faults that are injected after a run has ended; several in a row without a run between them."""
NEED_FSYNC = ("failing fsync", "power cut")
"""Faults that need a C compiler."""
