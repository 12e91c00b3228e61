"""What a training run says of itself, in terminals and notebooks."""

import time

from kit.core.measurement import oversubscribed
from kit.training import parallel

LOG_SECONDS = 20  # between two lines of the log


class Report:
    """One plain line at most every LOG_SECONDS, and a last one; called with the run."""

    def __init__(self, log: bool):
        self.log, self.hinted = log and parallel.rank() == 0, False
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, run) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        if not self.log or (wall < LOG_SECONDS and not run.finished):
            return
        self.wall, self.cpu, entry = self.wall + wall, self.cpu + cpu, run.history[-1]
        steps = run.config.steps
        left = run.seconds / run.step * (steps - run.step)
        left = "" if run.finished else f", about {left:.0f} s left"
        parts = [f"step {run.step}/{steps}", f"loss {entry['loss']:.4f}"]
        parts += [f"validation {entry['validation']:.4f}"] if "validation" in entry else []
        parts += [f"lr {entry['lr']:.1e}", f"{run.tokens / run.seconds:,.0f} targets/s"]
        print(*parts, f"{run.seconds:.0f} s{left}", sep="  ", flush=True)
        hint = oversubscribed(cpu / wall if run.device.type == "cpu" else 1.0)
        if hint and not self.hinted and wall > 1:
            print(hint, flush=True)
            self.hinted = True
