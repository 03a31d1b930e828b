"""The models: one logit a patch, equal for equal seeds, loaded from tensors alone."""

import re

import pytest
import torch
import torchvision

from lib.augment import model_input, no_augmentation, turned_views
from lib.centrenet import filter_copies, fold_norms
from lib.command import BadInput
from lib.config import load_config
from lib.models import (
    BUILDERS,
    HEADS,
    build_model,
    find_state,
    fit_state,
    fit_weights,
    logit_layer,
)

torch.set_num_threads(1)
SMALL = ["mlp_hidden=8", "cnn_width=4", "p4m_width=2"]


def build(model="cnn", seed=1, *overrides):
    torch.manual_seed(seed)
    keys = dict(pair.split("=") for pair in (*SMALL, *overrides)) | {"model": model}
    return build_model(load_config(overrides=[f"{key}={value}" for key, value in keys.items()]))


def draw_inputs(num: int) -> torch.Tensor:
    return torch.rand(num, 3, 96, 96).to(memory_format=torch.channels_last)


def equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def with_statistics(model):
    """The model in evaluation, its batch norms with factors and statistics unlike those of the
    start.
    """
    x = draw_inputs(4)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x + torch.randn_like(x))
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize("name", BUILDERS)
def test_every_model_learns_gives_one_logit_a_patch_and_computes_the_same_when_folded(name):
    model, x = build(name, 1, "dropout=0.25"), draw_inputs(4)
    assert equal(model, build(name)) and not equal(model, build(name, 2))
    assert 0.25 in [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.bfloat16())
    assert logits.shape == (4, 1) and logits.isfinite().all()
    logits.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    assert sum(bool(grad.any()) for grad in grads) > len(grads) / 2

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
    alone = model(x[3:])
    assert torch.allclose(plain[3:], alone, rtol=1e-4, atol=1e-4 * size)


def test_the_last_layer_computes_in_float32_unless_its_checkpoint_is_older_than_that():
    model, x = build("p4m"), draw_inputs(16).bfloat16()
    for ready in (model, fold_norms(model, torch.bfloat16)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = ready(x)
            logit_layer(ready).is_float32 = False
            assert ready(x).dtype == torch.bfloat16
        assert not torch.equal(logits, logits.bfloat16().float())


def test_a_state_of_another_model_is_refused_with_its_first_tensor_that_differs():
    model, state = build(), dict(build("cnn", 2).state_dict())
    wrong = {
        max(state): state | {max(state): torch.zeros(7, 7)},
        "0.a": state | {"0.a": torch.zeros(1), "zzz": torch.zeros(1)},
        "weights of a model": [1],
    }
    for name, values in wrong.items():
        with pytest.raises(BadInput, match=f"^a.pt .*{re.escape(name)}"):
            fit_state(model, values, "a.pt")
    assert equal(model, build()), "a refusal changes nothing"


def official(name) -> dict:
    """A state dict as torchvision's file of the model's ImageNet weights has it: 1,000 classes and
    names of its time.
    """
    torch.manual_seed(5)
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    return {
        old_name(key): torch.rand_like(tensor)
        for key, tensor in state.items()
        if not key.endswith("num_batches_tracked")
    }


def old_name(key):
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key)


@pytest.mark.parametrize("name", HEADS)
def test_the_trunk_of_torchvisions_file_is_taken_and_the_last_layer_stays_as_drawn(name, capsys):
    state, model = official(name), build(name)
    lacking = next(key for key in state if key.endswith("running_var"))
    rest = {key: state[key] for key in state if key != lacking}
    with pytest.raises(BadInput, match=f"^a.pth .*{re.escape(lacking)}"):
        fit_weights(model, name, rest, "a.pth")
    fit_weights(model, name, state, "imagenet.pth")
    assert HEADS[name] in capsys.readouterr().err
    drawn = build(name).state_dict()
    for key, tensor in model.state_dict().items():
        stays = key.startswith(HEADS[name]) or key.endswith("num_batches_tracked")
        assert torch.equal(tensor, drawn[key] if stays else state[old_name(key)]), key

    # a last layer of one output is taken too, under torchvision's own name
    other = build(name, 7)
    whole = {key.replace(f"{HEADS[name]}.1.", f"{HEADS[name]}."): tensor
             for key, tensor in other.state_dict().items()}  # fmt: skip
    fit_weights(model, name, whole, "one.pth")
    assert equal(model, other) and not capsys.readouterr().err


@pytest.mark.parametrize(
    "prefix, wrapper",
    [
        ("", ""),
        ("module.", ""),
        ("model.", ""),
        ("module._orig_mod.", "state_dict"),
        ("", "model"),
        ("", "model_state_dict"),
    ],
)
def test_weights_are_found_as_others_save_them(prefix, wrapper):
    model, saved = build(), build("cnn", 2)
    state = {f"{prefix}{key}": tensor for key, tensor in saved.state_dict().items()}
    file = {wrapper: state, "optimizer": {"state": {}}, "epoch": 3} if wrapper else state
    fit_weights(model, "cnn", find_state(file), "a.pt")
    assert equal(model, saved)


@pytest.mark.parametrize("num_cells", [2, 4, 6])
def test_the_centre_of_the_cnn_is_the_middle_four_cells_whatever_the_crop(num_cells):
    model, means = build("cnn", 1, "cnn_width=8").eval(), []
    model.features = torch.nn.Identity()
    model.head.register_forward_pre_hook(lambda _, args: means.append(args[0]))
    x = torch.zeros(1, 32, num_cells, num_cells)
    edge = num_cells // 2 - 1
    x[:, :, edge : num_cells - edge, edge : num_cells - edge] = 1
    model(x)
    assert torch.equal(means[0][0, 32:], torch.ones(32))
    assert means[0][0, :32].allclose(torch.tensor(4 / num_cells**2))


def test_p4m_gives_the_eight_symmetries_of_a_patch_one_logit_and_a_plain_network_does_not():
    images = torch.randint(256, (3, 96, 96, 3), dtype=torch.uint8)
    views = turned_views(images, (0, 0))
    inputs = [model_input(view, no_augmentation(3)) for view in views]
    spread = {}
    for name in ("p4m", "cnn"):
        model = with_statistics(build(name))
        with torch.no_grad():
            logits = torch.cat([model(x) for x in inputs], 1)
        spread[name] = float((logits - logits[:, :1]).abs().max() / logits.std(0).mean())
    assert spread["p4m"] < 1e-4 < 1e-2 < spread["cnn"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_eight_copies_of_a_filter_are_its_symmetries_in_orientations_that_turned_with_it(size):
    weight = torch.arange(8.0 * size * size)
    matrix = filter_copies(size, False, torch.device("cpu"))
    assert matrix.unique().tolist() == [0, 1]
    copies = (weight @ matrix).view(8, 8, -1)
    views = turned_views(weight.view(8, size, size, 1), (0, 0))
    for orientations, view in zip(copies, views, strict=True):
        assert sorted(orientations.tolist()) == sorted(view.reshape(8, -1).tolist())
    assert torch.equal(copies[0].flatten(), weight) and len(copies.unique(dim=0)) == 8


def test_a_model_can_be_trained_after_one_has_predicted_in_the_same_process():
    filter_copies.cache_clear()
    with torch.inference_mode():
        build("p4m").eval()(draw_inputs(1))
    build("p4m")(draw_inputs(1)).sum().backward()
