"""The device: chosen or refused by name, and described well enough to repeat a run."""

import json
import os

import pytest
import torch

from lib.command import BadInput
from lib.device import choose_device, describe_machine, free_device_bytes, layer_precision, memory_limit_bytes

HAS_GPU = torch.cuda.is_available()


def test_auto_takes_the_gpu_where_there_is_one():
    assert choose_device("auto") == torch.device("cuda:0" if HAS_GPU else "cpu") and choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "meta", "mps", "cuda:-1", "cuda:99", "CPU", *([] if HAS_GPU else ["cuda"])])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name):
    with pytest.raises(BadInput, match=f"^--device {name}: [^\n]*$"):
        choose_device(name)


def test_bf16_computes_layers_in_bf16_and_fp32_leaves_them():
    layer = torch.nn.Linear(4, 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with layer_precision(torch.device("cpu"), precision):
            assert layer(torch.ones(1, 4)).dtype == dtype


def test_the_machine_is_described_in_plain_json_and_has_memory():
    machine = describe_machine(choose_device("auto"))
    assert json.loads(json.dumps(machine)) == machine and ("gpu" in machine) == HAS_GPU
    assert all(machine[key] for key in ("host", "system", "cpu", "num_cores", "memory_bytes", "device", "cpu_capability"))
    assert 0 < memory_limit_bytes() <= machine["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free_device_bytes(torch.device("cpu")) == 0
