"""python -m tests.fuzz: mutants until the time is up, a table, and perhaps a record."""

import argparse
import random
import sys
import time
from collections import Counter, defaultdict

import torch

from kit.core.store import write_json
from tests.fuzz.readers import READERS
from tests.fuzz.workers import BAD, OUTCOMES, Worker


def run(names, seconds: float, seed: int, most: dict[str, int] | None = None) -> dict:
    """Mutants of these readers in turn, `most` of each or in proportion to them: {reader:
    {"mutants", outcomes, "slowest", "kinds", "examples"}}."""
    readers = {cls.name: cls() for cls in READERS if cls.name in names}
    worker, counts = Worker(readers), {name: Counter() for name in readers}
    found = {name: {"slowest": 0.0, "bases": len(r.bases)} for name, r in readers.items()}
    examples, kinds = defaultdict(list), {name: Counter() for name in readers}
    most = most or dict.fromkeys(readers, 10**9)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        name = min(readers, key=lambda name: counts[name].total() / most[name])
        if counts[name].total() >= most[name]:
            break
        outcome = worker(name, counts[name].total(), seed + number)
        number += 1
        counts[name][outcome["outcome"]] += 1
        kinds[name][f"{outcome['kind']}: {outcome['outcome']}"] += 1
        found[name]["slowest"] = max(found[name]["slowest"], outcome["seconds"])
        if outcome["outcome"] in BAD:
            examples[name].append({**outcome, "seed": seed + number - 1})
    worker.close()
    for name, count in counts.items():
        found[name] |= {"mutants": count.total(), **{o: count[o] for o in OUTCOMES}}
        found[name] |= {"kinds": dict(sorted(kinds[name].items())), "examples": examples[name][:40]}
    return found


def table(found: dict) -> str:
    rows = [["reader", "mutants", *OUTCOMES, "slowest (s)"]]
    for name, one in found.items():
        numbers = [f"{one[key]:,}" for key in ("mutants", *OUTCOMES)]
        rows.append([name, *numbers, f"{one['slowest']:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in rows)


def main() -> int:
    known = [cls.name for cls in READERS]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--reader", action="append", choices=known, help="all without it")
    parser.add_argument("--seed", type=int, default=None, help="another every time without it")
    parser.add_argument(
        "--most", type=int, default=None, help="mutants of each, artifacts ten times"
    )
    parser.add_argument("--record", default=None, help="JSON file for the outcomes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    names, most = options.reader or known, options.most or 10**9
    most = {name: 10 * most if name == "artifact" else most for name in names}
    found = run(names, 60 * options.minutes, seed, most)
    print(table(found), f"seed {seed}", sep="\n")
    for name, one in found.items():
        for example in one["examples"][:8]:
            print(name, example)
    if options.record:
        write_json(options.record, {"seed": seed, "readers": found})
    return int(any(one[outcome] for one in found.values() for outcome in BAD))


if __name__ == "__main__":
    sys.exit(main())
