"""Rivals at settings where they must be exact, and the sizes they claim."""

import numpy as np
import pytest
import torch

from kit.core.store import _computes
from kit.data import load_corpus
from notebooks.reference import frontier
from notebooks.reference.baseline import load_or_train


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    words = np.random.default_rng(0).choice(["mask", "prune", "round", "teach", "code"], 8000)
    (folder / "text.txt").write_text(
        "\n".join(" ".join(words[i : i + 8]) for i in range(0, 8000, 8))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_CACHE", str(folder))
        yield load_or_train(
            corpus=f"text:{folder / 'text.txt'}",
            vocab_size=270,
            batch_size=4,
            seq_len=32,
            steps=30,
            d_model=16,
            layers=1,
            experts=2,
            log=False,
        )


def test_rivals_that_lose_nothing_in_the_tables_are_as_good_as_the_rest_in_four_bits(
    dense, tmp_path
):
    rest = frontier._rival("rest", dense, lambda table: (table, []), tmp_path)
    exact = [
        frontier.product_quantized(dense, 1, tmp_path, centroids=256),
        frontier.low_rank(dense, 16, 8, tmp_path),
    ]
    assert exact[1]["perplexity"] == pytest.approx(rest["perplexity"], rel=0.02)
    assert all(row["bytes"] > rest["bytes"] for row in exact)
    assert frontier.hashed(dense, 4, tmp_path)["perplexity"] > rest["perplexity"]


def test_k_means_with_a_centre_for_each_point():
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    centres, codes = frontier._k_means(points, torch.ones(60), 60)
    assert (centres[codes] - points).abs().max() < 1e-6


def test_rounding_keeps_its_bytes(dense, tmp_path):
    row = frontier.rounded(dense, 6.0, tmp_path)
    assert row["ratio"] >= 6 and (tmp_path / "rounded_6x.kit").stat().st_size == row["bytes"]
    assert row["low"] <= row["perplexity"] <= row["high"]


def test_small_model_of_another_vocabulary_is_within_its_bytes_and_reads_the_same_text(
    dense, tmp_path
):
    same, other = (frontier.small_model(dense, 30000, tmp_path, 20, words) for words in (None, 262))
    assert max(same["bytes"], other["bytes"]) <= 30000 and "262 words" in other["name"]
    nats = (
        np.log(other["perplexity"])
        * len(load_corpus(dense.corpus.name, 262).test)
        / dense.corpus.utf8_bytes["test"]
    )
    assert other["bits_per_byte"] == pytest.approx(nats / np.log(2), rel=0.02)


def test_a_comment_is_not_another_model():
    assert (
        _computes("'A.'\nx = 1  # one\n") == _computes("'B.'\nx=1\n") != _computes("'B.'\nx = 2\n")
    )
