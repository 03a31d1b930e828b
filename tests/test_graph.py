"""A step as a CUDA graph, where there is no GPU: it is made plainly, with a line that says why.
tests/test_cuda.py has the captured ones.
"""

import pytest
import torch

from lib.config import load_config
from lib.graph import StepGraph
from lib.optimizers import build_optimizer


@pytest.fixture
def optimizer():
    return build_optimizer(torch.nn.Linear(3, 2), load_config())


def double(value):
    return 2 * value


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_capture_that_fails_goes_on_plainly_and_says_so_once(optimizer, capsys):
    graph = StepGraph()
    for number in range(1, 5):
        doubled = graph.run(double, (torch.full((1,), number),), (64,), optimizer)
        assert doubled == 2 * number
    assert capsys.readouterr().err.count("not captured as a CUDA graph: ") == 1
    adamw = optimizer.adamw.param_groups
    assert not any(group["capturable"] for group in adamw), "it would warn of plain steps"
