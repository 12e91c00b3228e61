import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("kit", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("kit")


@pytest.fixture(autouse=True)
def gradients_stay_on():
    yield
    assert torch.is_grad_enabled()
