"""Mutants of bytes and of JSON; everything is drawn from a `random.Random`."""

import copy
import json
import random

JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**53, 2**62, 2**63,
    10**12, 10**30, 0.5, -0.5, 2.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), "",
    "x", "=", "\x00", "é" * 40, "y" * 5000, "float32", "ternary", "d", "ge", "..", "norm.bias", [],
    {}, [[]], [0], [-1], [1] * 300, {"a": 1}, {"class": "X"}, {"bits": 4},
]  # fmt: skip
DEEP = "\x01deep\x01"


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: bits, bytes, runs, cuts, copies of parts elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, length = rng.randrange(len(out) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(len(out[at : at + length]))
        elif kind == 2:
            out[at : at + length] = bytes([rng.choice([0, 0xFF])]) * len(out[at : at + length])
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = rng.randbytes(length)
        elif kind == 5:
            del out[at:]
        else:
            start = rng.randrange(len(out) + 1)
            out[at : at + length] = out[start : start + length]
    return bytes(out)


def _places(value, found: list) -> list:
    """(container, key) of everything inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            _places(value[key], found)
    return found


def mutated_json(value, rng: random.Random):
    """A copy with one to three fields changed in value, type, name, number or order."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(value, [])
        if not places:
            return rng.choice(JUNK)
        holder, key = rng.choice(places)
        kind, old = rng.randrange(9), holder[key]
        if kind == 0 and rng.random() < 0.1:
            holder[key] = DEEP
        elif kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind <= 4 and isinstance(old, (int, float)):
            number = rng.choice([old + 1, old - 1, old * 2, -old, old * 1000, float(old), str(old)])
            holder[key] = number
            if rng.random() < 0.3:  # everywhere, so that the mutant agrees with itself
                for other, at in places:
                    if type(other[at]) is type(old) and other[at] == old:
                        other[at] = number
        elif kind == 5:
            del holder[key]
        elif kind == 6 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(old))
        elif kind == 6:
            holder[rng.choice(["other", "steps", "in", "bits", "earlier", key + "x"])] = old
        elif kind == 7 and isinstance(holder, list):
            at = rng.randrange(len(holder))
            holder[key], holder[at] = holder[at], holder[key]
        else:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at])
    return value


def text_of(value) -> str:
    """JSON, with what `mutated_json` marked as deep nested deeper than parsers go."""
    text = json.dumps(value)
    deep = "[" * 100_000 + "]" * 100_000
    return text.replace(json.dumps(DEEP), deep)
