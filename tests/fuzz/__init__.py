"""Mutated files for everything that the kit reads: what loads must be right, what does not is
refused in one sentence, quickly and in little memory.

    python -m tests.fuzz --minutes 60 [--reader artifact] [--record notebooks/reference/fuzz.json]

`mutations` makes the mutants, `readers` reads them and says what came out, `workers` does it in a
process with bounds on time and memory. `tests/test_fuzz.py` runs some with a fixed seed.
"""
