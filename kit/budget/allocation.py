"""Bytes shared out between tensors: the multiple-choice knapsack, solved by dynamic programming."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

CELLS = 1 << 20  # slices of the budget; up to so many bytes the solution is exact
Options = Mapping[str, Sequence[tuple[int, float]]]


def allocate(options: Options, budget: int, cells: int = CELLS) -> dict[str, int]:
    """For each name which of its (bytes, loss) pairs to take: the least loss within `budget`.

    Exact while the budget has at most `cells` bytes. Beyond, bytes are rounded up to slices of
    budget / cells, so that the budget still holds, and the loss is at most that of the best choice
    within a budget smaller by a slice a name. Raises ValueError when nothing fits.

    >>> allocate({"a": [(1, 5.0), (4, 0.0)], "b": [(1, 3.0), (3, 1.0)]}, 5)
    {'a': 1, 'b': 0}
    """
    if empty := [name for name, pairs in options.items() if not pairs]:
        raise ValueError(f"{empty[0]!r} has no option: give at least one pair of bytes and loss")
    smallest = {name: pairs.index(min(pairs)) for name, pairs in options.items()}
    least = sum(options[name][position][0] for name, position in smallest.items())
    if least > budget:
        raise ValueError(f"a budget of {budget} bytes is too small: at least {least} are needed")
    spare = budget - least  # counted above the smallest options, so rounding never closes the room
    size = max(math.ceil(spare / cells), 1)
    room = spare // size
    extra = {}
    for name, pairs in options.items():
        extra[name] = [math.ceil((bytes_ - min(pairs)[0]) / size) for bytes_, _ in pairs]
    best, picks = np.zeros(room + 1), []
    for name, pairs in options.items():
        trial, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.uint8)
        for position, (used, (_, loss)) in enumerate(zip(extra[name], pairs)):
            if used <= room:
                total = best[: room + 1 - used] + loss
                better = total < trial[used:]
                trial[used:][better], pick[used:][better] = total[better], position
        best = trial
        picks.append(pick)
    chosen = {}
    for name, pick in zip(reversed(options), reversed(picks)):
        chosen[name] = int(pick[room])
        room -= extra[name][chosen[name]]
    return {name: chosen[name] for name in options}
