"""Mutants in a process of their own, which is replaced when one of them takes it down."""

import faulthandler
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.readers import Contradiction, Reader

SECONDS = 2.0  # of processor time that a mutant may take
WALL = 60.0  # however busy the machine is
SPARE = 16 * 2**20  # bytes over 1.3 times what the honest file takes: caches, fragments, the coder
ROOM = 2**30  # of addresses, over what the process begins with
OUTCOMES = (
    "equal", "other", "refused", "exception", "contradiction", "hang", "memory", "killed"
)  # fmt: skip
BAD = OUTCOMES[3:]
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
CONTEXT = multiprocessing.get_context("fork")


def _kilobytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def _peak(work) -> tuple[object, int]:
    """What work() returns, and the bytes by which the process grew meanwhile."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _kilobytes("VmRSS")
    return work(), max(0, _kilobytes("VmHWM") - before) * 1024


def outcome_of(reader: Reader, number: int, seed: int, folder: Path, bound: int) -> dict:
    """What comes of one mutant: {"base", "kind", "outcome", "said", "seconds", "bytes"}."""
    rng = random.Random(f"{reader.name}-{seed}")
    base = reader.bases[number % len(reader.bases)]
    kind = rng.choice(reader.kinds)
    found = {"base": base.name, "kind": kind, "said": ""}
    start = time.process_time()

    def work():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return reader.read(folder, base), ""
        except Contradiction as error:
            return "contradiction", str(error)
        except reader.errors as error:
            text = str(error)
            if "allocate" in text or "MemoryError" in text:
                return "memory", text
            plain = text.strip() and "\n" not in text and len(text) < 2000
            return ("refused" if plain else "exception"), f"{type(error).__name__}: {text}"
        except MemoryError as error:
            return "memory", str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            return "exception", f"{type(error).__name__}: {error} ({where})"

    reader.write(folder, base, kind, rng)
    (found["outcome"], said), grown = _peak(work)
    if grown > bound:  # what a process imports and caches but once does not count
        grown = min(grown, _peak(work)[1])
    found["said"] = said[:300]
    found |= {"seconds": time.process_time() - start, "bytes": grown}
    if grown > bound and found["outcome"] != "exception":
        found |= {"outcome": "memory", "said": f"{grown:,} bytes; {found['said']}"}
    return found


def _serve(readers: dict[str, Reader], pipe, bounds: dict) -> None:
    faulthandler.disable()  # what a mutant does to its process is counted, not shown
    limit = _kilobytes("VmSize") * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        while (task := pipe.recv()) is not None:
            name, number, seed = task
            place = Path(folder) / name
            place.mkdir(exist_ok=True)
            pipe.send(outcome_of(readers[name], number, seed, place, bounds[name, number]))


class Worker:
    """`worker(reader name, base number, seed)` is the outcome of a mutant."""

    def __init__(self, readers: dict[str, Reader]):
        self.readers, self.process, self.bounds = readers, None, {}
        with tempfile.TemporaryDirectory() as folder:
            for name, reader in readers.items():
                for number, base in enumerate(reader.bases):
                    place = Path(folder) / f"{name}{number}"
                    place.mkdir()
                    for _ in range(2):  # the first compiles
                        reader.write(place, base, None, random.Random(0))
                        said, grown = _peak(lambda: reader.read(place, base))
                        assert said == "equal", (name, base.name, said)
                    self.bounds[name, number] = int(1.3 * grown) + SPARE

    def _start(self) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        arguments = self.readers, theirs, self.bounds
        self.process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def __call__(self, name: str, number: int, seed: int) -> dict:
        number %= len(self.readers[name].bases)
        if self.process is None or not self.process.is_alive():
            self._start()
        found = {"base": self.readers[name].bases[number].name, "kind": "", "bytes": 0}
        start, used = time.perf_counter(), self._cpu()
        self.pipe.send((name, number, seed))
        try:
            while not self.pipe.poll(0.5):
                busy, wall = self._cpu() - used, time.perf_counter() - start
                if busy > SECONDS or wall > WALL:
                    self.process.kill()
                    self.process.join()
                    said = f"{busy:.1f} s of processor time in {wall:.0f} s"
                    return found | {"outcome": "hang", "said": said, "seconds": busy}
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = f"exit code {self.process.exitcode}"
            return found | {"outcome": "killed", "said": code, "seconds": 0.0}

    def close(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.pipe.send(None)
            self.process.join()
