"""A step on a GPU, followed without one: fake tensors say where each operation reads and writes,
and refuse to tell a value.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lib import training
from lib.augment import on_device
from lib.batches import Rows, epoch_order, load_batches
from lib.centrenet import filter_copies
from lib.config import load_config
from lib.models import build_model
from lib.optimizers import build_optimizer

pytestmark = pytest.mark.slow

GPU = torch.device("cuda", 0)
NUM = 64


class OnGpuAlone(TorchDispatchMode):
    """Refuses an operation that touches a tensor on the CPU: on a GPU it would be a copy, which may
    wait.
    """

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = filter(torch.is_tensor, tree_flatten((args, kwargs, result))[0])
        assert all(tensor.device == GPU for tensor in tensors), f"{function} touches the CPU"
        return result


class ResidentSource:
    """The patches of a split as they lie on a GPU."""

    residence, device, can_stall = "device", GPU, False

    def __init__(self):
        self.patches = torch.zeros(NUM, 96, 96, 3, dtype=torch.uint8, device=GPU)

    def __len__(self):
        return NUM

    def gather(self, rows):
        return self.patches[rows]


def move_to_gpu(model: nn.Module) -> nn.Module:
    """The model with fake tensors on the GPU in place of its own."""

    def on_gpu(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(on_gpu(value))
        for name, value in module._buffers.items():
            module._buffers[name] = on_gpu(value)
    return model


@pytest.fixture
def fake_gpu():
    for cached in (filter_copies, on_device):
        cached.cache_clear()
    with FakeTensorMode():
        yield
    for cached in (filter_copies, on_device):  # they hold fake tensors
        cached.cache_clear()


@pytest.mark.parametrize("model", ["p4m", "cnn", "resnet18"])
def test_no_step_but_its_backward_pass_reads_a_value_or_copies_from_the_cpu(
    model, monkeypatch, request
):
    keys = (f"model={model}", "batch_size=8", "dropout=0.1", "grad_clip=1", "precision=fp32")
    cfg = load_config(overrides=keys)
    networks = [build_model(cfg) for _ in range(2)]
    request.getfixturevalue("fake_gpu")
    network, averaged = map(move_to_gpu, networks)
    progress = {"epoch": 0, "step": 0, "num_steps": 0}
    state = training.TrainState(network, averaged, build_optimizer(network, cfg), progress)
    for group in state.optimizer.adamw.param_groups:
        # the fused kernel has no form for fake tensors where the learning rate is a tensor
        group.update(fused=False, foreach=True, capturable=True)

    def compute_gradients(model, inputs, labels, *_):
        logits = model(inputs).flatten()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        # what a backward pass would leave: fake tensors have none
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        return loss.detach()

    monkeypatch.setattr(training, "compute_gradients", compute_gradients)
    rows = Rows(np.arange(NUM), np.zeros(NUM, np.uint8), {})
    order = epoch_order(rows, NUM, 0, cfg, GPU)
    batches = load_batches(ResidentSource(), rows.labels, list(order.split(8)))
    training.training_step(state, next(batches), cfg, 0.1)  # what is copied once is copied here
    with OnGpuAlone():
        result = training.training_step(state, next(batches), cfg, 0.1)
    with pytest.raises(DataDependentOutputException):  # as reading any value would
        float(result.loss)
