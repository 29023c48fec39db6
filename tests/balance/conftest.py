"""Two threads: the search for links is tested with threads that run side by side."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
