import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.models import bk_core, bk_kernels, bk_scan
from kit.models.bk_core import gated_parts, left_resolvent, staggered_reflection


def reference(x, p, eta):
    """left_resolvent as a plain torch loop."""
    return torch.complex(*bk_core.left_resolvent_pair(x, p, eta))


EVERY = {
    "left": left_resolvent,
    "left, scan": lambda *inputs: bk_kernels.apply(
        bk_scan.resolve, bk_scan.resolve_backward, *inputs
    ),
    "left, reference": reference,
}


def draw(batch=2, steps=20, channels=3, eta=None, dtype=torch.float64, seed=0):
    """Random x, p = b c from off-diagonals b and c of one sign, and eta."""
    generator = torch.Generator().manual_seed(seed)
    x, b, c = torch.randn(3, batch, steps, channels, generator=generator, dtype=torch.float64)
    width = (
        torch.rand(channels, generator=generator, dtype=torch.float64) + 0.01
        if eta is None
        else eta
    )
    return [
        part.to(dtype)
        for part in (x, (b * c).abs(), torch.as_tensor(width).double().expand(channels))
    ]


def dense(x, p, eta, seed=0):
    """(B, C, N, N) complex128 operators whose off-diagonal products are p, split unevenly into b
    and c."""
    b = np.random.default_rng(seed).uniform(0.5, 2, p.shape)
    matrix = np.zeros((x.shape[0], x.shape[2], x.shape[1], x.shape[1]), complex)
    i = np.arange(x.shape[1])
    matrix[..., i, i] = (x - 1j * eta).numpy().transpose(0, 2, 1)
    matrix[..., i[:-1], i[1:]] = b[:, 1:].transpose(0, 2, 1)
    matrix[..., i[1:], i[:-1]] = (p.numpy() / b)[:, 1:].transpose(0, 2, 1)
    return matrix


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [1, 2, 16, 37])
def test_left_resolvent_is_the_last_entry_of_each_cut_off_inverse(name, steps):
    x, p, eta = draw(steps=steps)
    matrix = dense(x, p, eta)
    last = [np.linalg.inv(matrix[..., : i + 1, : i + 1])[..., -1, -1] for i in range(steps)]
    np.testing.assert_allclose(EVERY[name](x, p, eta), np.stack(last, 1), rtol=1e-11)


@pytest.mark.parametrize("name", ["left", "left, scan"])
@pytest.mark.parametrize("steps", [1, 19])
def test_gradients_agree_with_finite_differences(name, steps):
    inputs = [part.clone().requires_grad_() for part in draw(steps=steps)]
    assert torch.autograd.gradcheck(EVERY[name], inputs)


@pytest.mark.parametrize("name", ["left", "left, scan"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 5), (1, 300, 130), (2, 257, 16)])
def test_kernels_agree_with_the_reference_forward_and_backward(name, shape, monkeypatch):
    monkeypatch.setattr(bk_kernels, "GRAIN", 1)
    monkeypatch.setattr(
        torch, "get_num_threads", lambda: 3
    )  # tiles and threads, also for one batch row
    inputs = [part.requires_grad_() for part in draw(*shape)]
    weight = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    g, truth = EVERY[name](*inputs), reference(*inputs)
    torch.testing.assert_close(g, truth)
    gradients = torch.autograd.grad(g, inputs, weight)
    torch.testing.assert_close(gradients, torch.autograd.grad(truth, inputs, weight))


@pytest.mark.parametrize("name", ["left", "left, scan"])
@pytest.mark.parametrize("steps", [1, 4096])
def test_float32_stays_close_at_the_smallest_eta(name, steps):
    inputs = [
        part.requires_grad_()
        for part in draw(steps=steps, channels=16, eta=1e-3, dtype=torch.float32)
    ]
    doubles = [part.detach().double().requires_grad_() for part in inputs]
    g, truth = EVERY[name](*inputs), left_resolvent(*doubles)
    assert relative_error(g, truth) < 3e-5
    gradients = torch.autograd.grad(g.abs().sum(), inputs)
    for actual, expected in zip(gradients, torch.autograd.grad(truth.abs().sum(), doubles)):
        assert relative_error(actual, expected) < 3e-5


@given(
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 0.1, 10.0]),
    st.sampled_from(["left", "left, scan"]),
)
def test_resolvents_stay_in_the_upper_half_plane_under_one_over_eta(seed, eta, name):
    x, p, eta = draw(1, 40, 4, eta, torch.float32, seed)
    g = EVERY[name](5 * x, 5 * p, eta)
    assert (g.imag > 0).all() and (g.abs() <= (1 + 1e-3) / eta).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("moved", [0, 1])
def test_left_resolvent_is_causal_to_the_last_bit(name, moved):
    inputs = draw(dtype=torch.float32)
    before = EVERY[name](*inputs)
    inputs[moved][:, 11] += 1
    after = EVERY[name](*inputs)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:14] != after[:, 11:14]).all()


@pytest.mark.parametrize("name", ["left", "left, scan"])
def test_the_first_hopping_is_ignored_and_has_no_gradient(name):
    x, p, eta = draw()
    p.requires_grad_()
    g = EVERY[name](x, p, eta)
    torch.testing.assert_close(g, EVERY[name](x, torch.cat([p[:, :1] + 9, p[:, 1:]], 1), eta))
    g.real.sum().backward()
    assert (p.grad[:, 0] == 0).all() and (p.grad[:, 1:] != 0).all()


@pytest.mark.parametrize("name", ["left", "left, scan"])
def test_strided_inputs_and_gradients_are_accepted(name):
    x, p, eta = (part.requires_grad_() for part in draw())
    inputs = [
        part.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        for part in (x, p)
    ]
    wide = torch.stack([eta.detach()] * 2, 1)[:, 0].requires_grad_()
    for arguments in ((x, p, eta), (*inputs, wide)):
        EVERY[name](*arguments).conj().sum().imag.backward()
    for plain, strided in zip((x, p, eta), (*inputs, wide)):
        torch.testing.assert_close(plain.grad, strided.grad)


def test_without_gradients_the_kernel_gives_the_same_and_keeps_no_graph():
    x, p, eta = (part.requires_grad_() for part in draw())
    with torch.no_grad():
        g = left_resolvent(x, p, eta)
    assert not g.requires_grad and torch.equal(g, left_resolvent(x, p, eta))


def test_autocast_computes_in_float32():
    x, p, eta = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        g = left_resolvent(x, p.bfloat16(), eta)
    assert torch.equal(g, left_resolvent(x, p.bfloat16().float(), eta))


def test_threads_calling_at_once_get_the_same_as_one(monkeypatch):
    monkeypatch.setattr(bk_kernels, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    inputs = draw(8, 200, 8)
    truth, results = left_resolvent(*inputs), []
    threads = [
        threading.Thread(target=lambda: results.append(left_resolvent(*inputs))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, truth) for result in results)


def _in_child(connection, inputs):
    connection.send(left_resolvent(*inputs).numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_compute(monkeypatch):
    monkeypatch.setattr(bk_kernels, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    inputs = draw(4, 50, 4)
    truth = left_resolvent(*inputs)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(theirs, inputs))
    child.start()
    assert ours.poll(20)
    np.testing.assert_array_equal(ours.recv(), truth)
    child.join(20)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x, p, eta: (x[0], p[0], eta), r"shapes \(20, 3\)"),
        (lambda x, p, eta: (x, p[:, 1:], eta), r"shapes \(2, 20, 3\), \(2, 19, 3\), \(3,\)"),
        (lambda x, p, eta: (x, p, eta[:2]), r"\(2,\): give \(B, N, C\)"),
        (lambda x, p, eta: (x[:, :0], p[:, :0], eta), "none of them empty"),
        (lambda x, p, eta: (x, p.float(), eta), "all float32 or all float64"),
        (lambda x, p, eta: (x.half(), p.half(), eta.half()), "torch.float16"),
        (lambda x, p, eta: (x, p, eta - eta.min()), "smallest value is 0"),
        (lambda x, p, eta: (x, p, eta * float("nan")), "smallest value is nan"),
    ],
)
def test_bad_input_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        left_resolvent(*change(*draw()))


class _Pair(torch.nn.Module):
    def forward(self, x, p, eta):
        return bk_core.left_resolvent_pair(x, p, eta)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_takes_any_length():
    length = {1: torch.export.Dim("length", min=2)}
    inputs = tuple(draw(steps=5))
    program = torch.export.export(_Pair(), inputs, dynamic_shapes=(length, length, None)).module()
    for steps in (3, 40):
        inputs = draw(steps=steps)
        torch.testing.assert_close(torch.complex(*program(*inputs)), left_resolvent(*inputs))


def test_reflection_is_the_cayley_transform_of_the_staggered_operator():
    x, p, eta = draw(steps=21)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(11)[:21, None]
    matrix = dense(x * sign, p, eta)
    g = np.stack([np.linalg.inv(matrix[..., : i + 1, : i + 1])[..., -1, -1] for i in range(21)], 1)
    r = (g - 1j) / (g + 1j)
    truth = np.where(sign > 0, r, r.conj())
    np.testing.assert_allclose(staggered_reflection(x, p, eta), truth, rtol=1e-11)
    np.testing.assert_allclose(
        torch.complex(*bk_core.staggered_reflection_pair(x, p, eta)), truth, rtol=1e-11
    )
    assert (np.abs(truth) < 1).all()


@pytest.mark.parametrize("steps", [1, 2, 19])
def test_gradients_of_the_reflection_agree_with_finite_differences(steps):
    assert torch.autograd.gradcheck(
        staggered_reflection, [part.clone().requires_grad_() for part in draw(steps=steps)]
    )


@pytest.mark.parametrize("shape", [(3, 33, 5), (1, 300, 130)])
def test_the_reflection_kernels_agree_with_the_reference_in_tiles(shape, monkeypatch):
    monkeypatch.setattr(bk_kernels, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    inputs = [part.requires_grad_() for part in draw(*shape)]
    weight = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    r, truth = (
        staggered_reflection(*inputs),
        torch.complex(*bk_core.staggered_reflection_pair(*inputs)),
    )
    torch.testing.assert_close(r, truth)
    torch.testing.assert_close(
        torch.autograd.grad(r, inputs, weight), torch.autograd.grad(truth, inputs, weight)
    )


def test_reflection_moves_with_its_input_by_an_odd_number_of_steps():
    x, p, eta = draw(steps=40)
    x[:, 0], p[:, 1] = 0, 0  # the step before does not reach the others
    moved = staggered_reflection(x[:, 1:], p[:, 1:], eta)
    torch.testing.assert_close(staggered_reflection(x, p, eta)[:, 1:], moved)


def test_reflection_integrates_a_weak_potential_for_one_over_eta_steps():
    x, eta = torch.zeros(1, 400, 1, dtype=torch.float64), torch.tensor([0.02], dtype=torch.float64)
    p, pulse = torch.ones_like(x), x.clone()
    pulse[:, 300] = 1e-6
    answer = (staggered_reflection(pulse, p, eta) - staggered_reflection(x, p, eta))[
        0, 300:, 0
    ].abs()
    torch.testing.assert_close(
        answer[50] / answer[0], torch.tensor(np.exp(-1.0)), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 70)])
def test_gated_parts_and_their_gradients(shape, monkeypatch):
    monkeypatch.setattr(bk_kernels, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(shape, dtype=torch.complex128, generator=generator).requires_grad_()
    gate = torch.randn(
        *shape[:2], 2 * shape[2], dtype=torch.float64, generator=generator
    ).requires_grad_()
    truth = torch.cat([r.real, r.imag], -1) * gate
    torch.testing.assert_close(gated_parts(r, gate), truth)
    weight = torch.randn(truth.shape, dtype=torch.float64, generator=generator)
    gradients = (torch.autograd.grad(y, (r, gate), weight) for y in (gated_parts(r, gate), truth))
    torch.testing.assert_close(*gradients)
