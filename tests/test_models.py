"""The models: one logit a patch, equal for equal seeds, loaded from tensors alone."""

import re

import pytest
import torch
import torchvision

from lib.augment import eight_views, model_input, no_augmentation
from lib.centrenet import EPSILON, GroupBatchNorm, filter_copies, fold_norms, norms_repeated
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
    num_parameters,
)

torch.set_num_threads(1)


def build(model="mlp", seed=1, mlp_hidden="8", cnn_width=4, dropout=0.0, device="cpu"):
    torch.manual_seed(seed)
    values = {
        "model": model,
        "mlp_hidden": mlp_hidden,
        "cnn_width": cnn_width,
        "p4m_width": 2,
        "dropout": dropout,
    }
    with torch.device(device):
        return build_model(
            load_config(overrides=[f"{key}={value}" for key, value in values.items()])
        )


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_model_gives_one_finite_logit_a_patch_and_learns_in_both_precisions(name):
    model = build(name)
    x = torch.rand(2, 3, 96, 96).to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x.to(dtype)).float().flatten()
        assert logits.shape == (2,) and logits.isfinite().all()
        model.zero_grad()
        logits.sum().backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(
            grad is not None and grad.dtype == torch.float32 and grad.isfinite().all()
            for grad in grads
        )
        assert sum(bool(grad.any()) for grad in grads) > len(grads) / 2


def with_statistics(model):
    """The model in evaluation, its batch norms with factors and statistics unlike those of the
    start.
    """
    x = torch.rand(4, 3, 96, 96).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x + torch.randn_like(x))
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model.eval()


def count_norms(model):
    return sum("BatchNorm" in type(layer).__name__ for layer in model.modules())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_folded_model_computes_the_same(name):
    model, x = (
        with_statistics(build(name)),
        torch.rand(4, 3, 96, 96).to(memory_format=torch.channels_last),
    )
    folded = fold_norms(model, torch.float32)
    with torch.no_grad():
        plain, fast = model(x), folded(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = fold_norms(model, torch.bfloat16)(x.bfloat16())
    assert count_norms(folded) < count_norms(model) or name == "mlp"
    assert torch.allclose(fast, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert low.dtype == torch.float32 and torch.allclose(
        low, plain, rtol=0.05, atol=0.05 * float(plain.abs().max())
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_the_last_layer_computes_in_float32_unless_its_checkpoint_is_older_than_that(name):
    model, inputs = build(name), []
    last = logit_layer(model)
    last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x = torch.rand(16, 3, 96, 96).to(memory_format=torch.channels_last)
    for ready in (model, fold_norms(model, torch.bfloat16)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = ready(x.bfloat16())
            logit_layer(ready).is_float32 = False
            old = ready(x.bfloat16())
        assert logits.dtype == torch.float32 and not torch.equal(
            logits, logits.bfloat16().float()
        ), "no grid of bfloat16"
        assert torch.equal(
            logits, torch.nn.functional.linear(inputs[-2].float(), last.weight, last.bias)
        )
        assert old.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BUILDERS)
def test_the_weights_are_a_function_of_the_seed_and_the_dropout_is_the_config_s(name):
    model = build(name, dropout=0.25)
    assert equal(model, build(name)) and not equal(model, build(name, seed=2))
    assert 0.25 in [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]


def test_the_config_shapes_the_models_and_a_trained_one_sees_each_patch_alone():
    assert [
        layer.out_features
        for layer in build(mlp_hidden="7,5")
        if isinstance(layer, torch.nn.Linear)
    ] == [7, 5, 1]
    assert num_parameters(build(mlp_hidden="")) == 96 * 96 * 3 + 1, (
        "no hidden layer: logistic regression"
    )
    assert num_parameters(build("cnn", cnn_width=32)) > 3 * num_parameters(
        build("cnn", cnn_width=16)
    )
    x = torch.rand(5, 3, 96, 96)
    for model in (build("cnn", dropout=0.5).eval(), build(dropout=0.5).eval()):
        assert torch.allclose(model(x)[3:4], model(x[3:4]), atol=1e-5)


def test_a_state_goes_in_and_comes_out_equal_in_the_model_s_own_number_type():
    model = build("cnn")
    doubles = {name: value.double() for name, value in model.state_dict().items()}
    for state in (model.state_dict(), doubles):
        other = build("cnn", seed=2)
        fit_state(other, state, "a.pt")
        assert equal(other, model) and next(other.parameters()).dtype == torch.float32


def test_a_state_of_another_model_is_refused_with_its_first_tensor_that_differs():
    model, state = build("cnn"), dict(build("cnn", seed=2).state_dict())
    first, *_, last = sorted(state)
    wrong = {
        last: [
            {name: value for name, value in state.items() if name != last},
            {name: value for name, value in state.items() if name != last} | {"zzz": state[first]},
            state | {last: torch.zeros(7, 7)},
        ],
        "0.a": [state | {"0.a": torch.zeros(1), "zzz": torch.zeros(1)}],
        "weights of a model": [{first: 3}, [1], None, torch.zeros(3)],
    }
    for named, states in wrong.items():
        for values in states:
            with pytest.raises(BadInput, match=f"^a.pt .*{re.escape(named)}"):
                fit_state(model, values, "a.pt")
    assert equal(model, build("cnn")), "a refusal changes nothing"


def official(name):
    """A state dict as torchvision's file of the model's ImageNet weights has it: 1,000 classes and
    names of its time.
    """
    torch.manual_seed(5)
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    state = {
        key: torch.rand_like(tensor)
        for key, tensor in state.items()
        if not key.endswith("num_batches_tracked")
    }
    return {old_name(key): tensor for key, tensor in state.items()}


def old_name(key):
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key)


@pytest.mark.parametrize("name", HEADS)
def test_the_trunk_of_torchvisions_file_is_taken_and_the_last_layer_stays_as_drawn(name, capsys):
    state, model = official(name), build(name)
    fit_weights(model, name, state, "imagenet.pth")
    assert HEADS[name] in capsys.readouterr().err
    drawn = build(name).state_dict()
    for key, tensor in model.state_dict().items():
        is_kept = key.startswith(HEADS[name]) or key.endswith("num_batches_tracked")
        assert torch.equal(tensor, drawn[key] if is_kept else state[old_name(key)]), key

    # a last layer of one output is taken too, be it torchvision's own or this program's
    whole = dict(build(name, seed=7).state_dict())
    for key in list(whole):
        if key.startswith(HEADS[name]):
            whole[key.replace(".1.", ".")] = whole.pop(key)
    fit_weights(model, name, whole, "one.pth")
    assert equal(model, build(name, seed=7)) and not capsys.readouterr().err


@pytest.mark.parametrize("name", HEADS)
def test_a_trunk_that_lacks_more_than_the_last_layer_is_refused(name, capsys):
    model, state = build(name), official(name)
    lacking = next(key for key in state if key.endswith("running_var"))
    wrong = {
        lacking: {key: state[key] for key in state if key != lacking},
        "layer9.weight": state | {"layer9.weight": torch.zeros(1)},
        "missing": {f"{HEADS[name]}.weight": torch.zeros(1000, 8)},
    }
    for named, values in wrong.items():
        with pytest.raises(BadInput, match=f"^a.pth .*{re.escape(named)}"):
            fit_weights(model, name, values, "a.pth")
    assert equal(model, build(name)) and not capsys.readouterr().err


FORMS = {
    "plain": lambda state: state,
    "half": lambda state: {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    },
    "ddp": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "lightning": lambda state: {f"model.{key}": tensor for key, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
    "both": lambda state: {
        "state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()},
        "epoch": 3,
    },
    "model": lambda state: {"model": state, "optimizer": {"state": {}}, "config": {"width": 3}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_as_others_save_them(form):
    model, saved = build("cnn"), build("cnn", seed=2)
    fit_weights(model, "cnn", find_state(FORMS[form](dict(saved.state_dict()))), "a.pt")
    state, expected = model.state_dict(), saved.state_dict()
    assert all(
        torch.allclose(state[key], expected[key], atol=1e-3 * (form == "half")) for key in expected
    )


@pytest.mark.parametrize("num_cells", [2, 4, 6])
def test_the_centre_of_the_cnn_is_the_middle_four_cells_whatever_the_crop(num_cells):
    model = build("cnn", cnn_width=8).eval()
    model.features, means = torch.nn.Identity(), []
    model.head.register_forward_pre_hook(lambda _, args: means.append(args[0]))
    x = torch.zeros(1, 32, num_cells, num_cells)
    edge = num_cells // 2 - 1
    x[:, :, edge : num_cells - edge, edge : num_cells - edge] = 1
    model(x)
    assert torch.equal(means[0][0, 32:], torch.ones(32)) and means[0][0, :32].allclose(
        torch.tensor(4 / num_cells**2)
    )


def test_p4m_gives_the_eight_symmetries_of_a_patch_one_logit_and_a_plain_network_does_not():
    torch.manual_seed(0)
    images = torch.randint(256, (3, 96, 96, 3), dtype=torch.uint8)
    spread = {}
    for name in ("p4m", "cnn"):
        model = build(name)
        x = model_input(images, no_augmentation(3))
        for _ in range(3):  # statistics that are not those of the start
            model(x + torch.randn_like(x))
        model.eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point() and tensor.ndim == 1:
                    tensor.add_(torch.rand_like(tensor))
            views = [
                model(model_input(view, no_augmentation(3))) for view in eight_views(images, (0, 0))
            ]
            logits = torch.cat(views, 1)
        spread[name] = float((logits - logits[:, :1]).abs().max() / logits.std(0).mean())
    assert spread["p4m"] < 1e-4 < 1e-2 < spread["cnn"]


def test_the_eight_copies_of_a_filter_are_its_symmetries_in_orientations_that_turned_with_it():
    for size in (2, 3, 4):
        weight = torch.arange(8.0 * size * size)
        copies = (weight @ filter_copies(size, False, torch.device("cpu"))).view(8, 8, size, size)
        patches = weight.view(8, size, size, 1).byte().expand(-1, -1, -1, 3)
        for g, turned in enumerate(eight_views(patches[..., 0].float()[..., None], (0, 0))):
            turned = turned[..., 0]
            assert sorted(map(tuple, copies[g].flatten(1).tolist())) == sorted(
                map(tuple, turned.flatten(1).tolist())
            )
        assert (
            torch.equal(copies[0].flatten(), weight)
            and len({tuple(c.flatten().tolist()) for c in copies}) == 8
        )


def test_a_model_can_be_trained_after_one_has_predicted_in_the_same_process():
    filter_copies.cache_clear()
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        build("p4m").eval()(x)
    build("p4m")(x).sum().backward()


@pytest.mark.parametrize("name", ["cnn", "p4m"])
def test_layers_keep_the_memory_format_that_they_are_given(name):
    x = torch.rand(2, 3, 96, 96)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = build(name).features(x.to(memory_format=memory_format))
        assert features.is_contiguous(memory_format=memory_format), (
            "else a benchmark of the other one measures nothing"
        )


@pytest.mark.parametrize("orientations", [1, 8])
def test_norms_repeated_together_are_those_repeated_one_by_one(orientations):
    """Outputs, gradients and running statistics."""
    torch.manual_seed(0)
    x = torch.randn(4, 3 * orientations, 5, 5)
    results = []
    for together in (True, False):
        norm = GroupBatchNorm(3, orientations)
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
        before = norm.repeated_tensors()
        if together:
            with norms_repeated([norm], orientations):
                out = norm(x)
            mean, var = norm.running_mean, norm.running_var
        else:
            mean, var, weight, bias = before
            out = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, eps=EPSILON)
            mean, var = (values.view(orientations, -1).mean(0) for values in (mean, var))
        (out * torch.arange(5.0)).sum().backward()
        results.append([out, mean, var, norm.weight.grad, norm.bias.grad])
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*results, strict=True))
    assert norm.repeated is None
