"""Kills at random times, and several processes at once, for all work that leaves files behind.

`python -m tests.kills --kills 200 --record FILE` kills each kind of work and calls it again;
`--together 20` has two and four processes do each at the same moment. A few kills are part of the
test run.
"""
