"""The models: one logit a patch, equal for equal seeds, loaded from tensors alone."""

import re

import pytest
import torch
import torchvision

from lib.augment import normalise, turned_views
from lib.centrenet import GroupBatchNorm, filter_copies, fold_norms
from lib.command import BadInput
from lib.config import load_config
from lib.models import BUILDERS, HEADS, build_model, fit_state, fit_weights, logit_layer

torch.set_num_threads(1)
SMALL = ("mlp_hidden=8", "cnn_width=4", "p4m_width=2")


def build(model="cnn", seed=1, *overrides):
    torch.manual_seed(seed)
    return build_model(load_config(overrides=[*SMALL, f"model={model}", *overrides]))


def draw_inputs(num: int) -> torch.Tensor:
    return torch.rand(num, 3, 96, 96).to(memory_format=torch.channels_last)


def equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def with_statistics(model):
    """The model in evaluation, its batch norms with factors and statistics unlike those of the
    start.
    """
    with torch.no_grad():
        model.train()(draw_inputs(4))
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize("name", ["cnn", "p4m"])
def test_in_bf16_running_means_reach_those_of_the_batch(name):
    model, x = build(name).train(), draw_inputs(2)[..., :32, :32].bfloat16()
    norm = next(layer for layer in model.modules() if isinstance(layer, GroupBatchNorm))
    seen = []
    norm.register_forward_pre_hook(lambda _norm, args: seen.append(args[0].detach().float()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(80):
            model(x)
    means = seen[-1].mean((0, 2, 3)).view(norm.orientations, -1).mean(0)
    assert torch.allclose(norm.running_mean, means, rtol=0.003, atol=1e-4)


LARGE = ("resnet18", "densenet121")  # which take a quarter of a minute


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in BUILDERS],
)
def test_every_model_learns_gives_one_logit_a_patch_and_computes_the_same_when_folded(name):
    model, x = build(name), draw_inputs(4)
    assert equal(model, build(name)) and not equal(model, build(name, 2))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.bfloat16())
    assert logits.shape == (4, 1)
    logits.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)

    model = with_statistics(model)
    folded = fold_norms(model, torch.float32)
    with torch.no_grad():
        plain, fast = model(x), folded(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = fold_norms(model, torch.bfloat16)(x.bfloat16())
    assert len(folded.state_dict()) < len(model.state_dict()) or name == "mlp"
    size = float(plain.abs().max())
    assert torch.allclose(fast, plain, rtol=1e-4, atol=1e-4 * size)
    assert torch.allclose(low, plain, rtol=0.05, atol=0.05 * size)


def test_a_state_of_another_model_is_refused_with_its_first_tensor_that_differs():
    model, state = build(), dict(build("cnn", 2).state_dict())
    last = max(state)
    for name, tensors in ((last, {last: torch.zeros(7, 7)}), ("0.a", {"0.a": torch.zeros(1)})):
        with pytest.raises(BadInput, match=f"^a.pt .*{re.escape(name)}"):
            fit_state(model, state | tensors, "a.pt")


def official(name) -> dict:
    """A state dict as torchvision's file of the model's ImageNet weights has it: 1,000 classes and
    names of its time.
    """
    torch.manual_seed(5)
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): torch.rand_like(tensor)
        for key, tensor in state.items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("name", HEADS)
def test_the_trunk_of_torchvisions_file_is_taken_and_the_last_layer_stays_as_drawn(name, capsys):
    state, model = official(name), build(name)
    fit_weights(model, name, state, "imagenet.pth")
    assert HEADS[name] in capsys.readouterr().err
    drawn = build(name)
    trunk = [tensor for key, tensor in state.items() if not key.startswith(HEADS[name])]
    loaded = dict(model.state_dict())
    names = [key for key in loaded if not key.endswith("num_batches_tracked")]
    assert all(torch.equal(loaded[key], tensor) for key, tensor in zip(names, trunk, strict=False))
    assert torch.equal(logit_layer(model).weight, logit_layer(drawn).weight)

    # a last layer of one output is taken too, under torchvision's own name, behind a wrapper
    other = build(name, 7)
    whole = {
        f"module._orig_mod.{key.replace(f'{HEADS[name]}.1.', f'{HEADS[name]}.')}": tensor
        for key, tensor in other.state_dict().items()
    }
    fit_weights(model, name, whole, "one.pth")
    assert equal(model, other) and not capsys.readouterr().err


def test_p4m_gives_the_eight_symmetries_of_a_patch_one_logit_and_a_plain_network_does_not():
    images = torch.randint(256, (3, 96, 96, 3), dtype=torch.uint8)
    views = turned_views(images, (0, 0))
    inputs = [normalise(view, torch.ones(3, 3), torch.zeros(3, 3)) for view in views]
    spread = {}
    for name in ("p4m", "cnn"):
        model = with_statistics(build(name))
        with torch.no_grad():
            logits = torch.cat([model(x) for x in inputs], 1)
        spread[name] = float((logits - logits[:, :1]).abs().max() / logits.std(0).mean())
    assert spread["p4m"] < 1e-4 < 1e-2 < spread["cnn"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_eight_copies_of_a_filter_hold_its_values_exactly_in_orientations_that_turn(size):
    weight = torch.arange(8.0 * size * size)
    copies = (weight @ filter_copies(size, 8, torch.device("cpu"))).view(8, 8, -1)
    views = turned_views(weight.view(8, size, size, 1), (0, 0))
    for orientations, view in zip(copies, views, strict=True):
        assert sorted(orientations.tolist()) == sorted(view.reshape(8, -1).tolist())
    assert torch.equal(copies[0].flatten(), weight) and len(copies.unique(dim=0)) == 8


def test_a_model_can_be_trained_after_one_has_predicted_in_the_same_process():
    filter_copies.cache_clear()
    with torch.inference_mode():
        build("p4m").eval()(draw_inputs(1))
    build("p4m")(draw_inputs(1)).sum().backward()
