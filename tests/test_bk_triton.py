"""The Triton kernels of the BK-core beside the compiled ones of the CPU: on a GPU where there is
one, else in Triton's interpreter, which has to be chosen before Triton is imported: this file is
what that process runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.models import bk_core, bk_kernels, bk_scan
from tests.far import pretended

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(dtype, tolerance, shape):
    from notebooks.reference import bk_triton

    torch.manual_seed(0)
    x, p = torch.randn(shape, dtype=dtype), 1.5 * torch.rand(shape, dtype=dtype)
    eta = 0.5 * torch.rand(shape[2], dtype=dtype) + 0.02
    near = {"rtol": tolerance, "atol": tolerance}
    for reflected in (False, True):
        expected, *saved = bk_kernels.resolve(x, p, eta, reflected)
        found, *own = bk_triton.resolve(*(t.to(DEVICE) for t in (x, p, eta)), reflected)
        torch.testing.assert_close(found.cpu(), expected, **near)
        w = torch.randn_like(expected)
        ours = bk_triton.resolve_backward(*own, w.to(DEVICE), reflected)
        for a, b in zip(ours, bk_kernels.resolve_backward(*saved, w, reflected)):
            torch.testing.assert_close(a.cpu(), b, **near)


def main():
    for shape in ((2, 9, 5), (1, 1, 3), (2, 20, 40)):  # rows, steps, channels; fewer and more
        compare(torch.float64, 1e-11, shape)
        compare(torch.float32, 3e-4, shape)
    if DEVICE == "cuda":
        compare(torch.float64, 1e-9, (3, 3000, 70))
    print("all agree")


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_computes_what_the_compiled_kernels_compute():
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    more = {"PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {})
    run = [sys.executable, "-m", "tests.test_bk_triton"]
    done = subprocess.run(
        run, cwd=root, env=os.environ | more, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "all agree", done.stderr[-3000:]


def test_the_core_uses_the_kernels_that_are_set(monkeypatch):
    class Like:  # the interface of bk_triton
        calls = 0
        reflect_backward = bk_kernels.reflect_backward

        @classmethod
        def reflect(cls, *parts):
            cls.calls += 1
            return bk_kernels.reflect(*(part.cpu() for part in parts))

    x, p, eta = torch.randn(2, 12, 3), torch.rand(2, 12, 3), torch.ones(3)
    expected = bk_core.staggered_reflection(x, p, eta)
    with pretended() as device:
        far = [part.to(device) for part in (x, p, eta)]
        for backend in (bk_scan, Like):
            monkeypatch.setattr(bk_core, "on_device", backend)
            torch.testing.assert_close(bk_core.staggered_reflection(*far).cpu(), expected)
    assert Like.calls == 1


if __name__ == "__main__":
    main()
