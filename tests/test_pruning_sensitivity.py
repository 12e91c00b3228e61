import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kit import artifact
from kit.budget import scan, sensitivity, sparsities_for_budget
from kit.core.weights import copy_model, materialize, weights
from kit.models import DigitsMLP
from kit.pruning import MagnitudePruner
from kit.quantization import Format, quantize_weights
from kit.training.evaluation import evaluate


def model():
    torch.manual_seed(0)
    return DigitsMLP().eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (60,), generator=generator)
    return list(DataLoader(TensorDataset(images, labels), batch_size=30))


def test_each_cell_is_the_loss_with_one_tensor_pruned():
    dense = model()
    table = scan(dense, batches(), (0.5, 0.9), ["1.weight", "3.weight"])
    assert list(table.sparsity) == [0.0, 0.5, 0.9] * 2 and list(table.increase[::3]) == [0, 0]
    for row in table.itertuples():
        alone = MagnitudePruner(copy_model(dense), row.tensor).prune(row.sparsity)
        assert row.loss == pytest.approx(evaluate(alone, batches()).loss, rel=1e-6)
    assert all(
        torch.equal(a, b)
        for a, b in zip(dense.state_dict().values(), model().state_dict().values())
    )


@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_are_those_in_the_file(bits, tmp_path):
    pruned = model()
    if bits:
        quantize_weights(pruned, Format(bits))
    MagnitudePruner(pruned).prune(0.8)
    artifact.save(pruned, tmp_path / "model.kit")
    table = artifact.describe(tmp_path / "model.kit").set_index("tensor")
    for weight in weights(pruned, matrices=True):
        assert artifact.tensor_bytes(weight) == table.bytes[weight.name]


def test_a_scan_is_read_again_only_for_the_same_weights_and_batches(tmp_path, monkeypatch):
    first = scan(model(), batches(), cache=tmp_path)
    monkeypatch.setattr(sensitivity, "evaluate", None)
    again = scan(model(), batches(), cache=tmp_path)
    assert again.equals(first) and len(list(tmp_path.iterdir())) == 1
    changed = model()
    with torch.no_grad():
        changed[1].bias[0] += 1e-3
    with pytest.raises(TypeError):
        scan(changed, batches(), cache=tmp_path)
    with pytest.raises(TypeError):
        scan(model(), batches()[:1], cache=tmp_path)


def test_budget_is_kept_and_used():
    dense = model()
    table = scan(dense, batches())
    budget = int(table[table.sparsity == 0.8].bytes.sum())
    plan = sparsities_for_budget(table, budget)
    pruned = MagnitudePruner(dense).prune(plan)
    spent = sum(map(artifact.tensor_bytes, weights(pruned, matrices=True)))
    assert 0.8 * budget < spent <= budget
    predicted = sum(table.set_index(["tensor", "sparsity"]).increase[list(plan.items())])
    uniform = table[table.sparsity == 0.8].increase.sum()
    assert predicted <= uniform
    with pytest.raises(ValueError, match="budget of 10 bytes is too small"):
        sparsities_for_budget(table, 10)
    assert (
        materialize(pruned)[1].weight.count_nonzero()
        < dense[1].parametrizations.weight.original.numel()
    )
