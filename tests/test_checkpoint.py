"""A checkpoint comes back as it was saved or is refused in one sentence: cut, altered, foreign,
newer or with code in it.
"""

import contextlib
import hashlib
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from lib.checkpoint import (
    FIELDS,
    KIND,
    SCHEMA,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
    state_sha256,
    weights_sha256,
)
from lib.command import BadInput


@pytest.fixture(scope="module")
def best(quick_run) -> Path:
    return quick_run / "best.pt"


@pytest.fixture
def fields(best):
    """What save_checkpoint takes, of a good checkpoint."""
    return load_checkpoint(best)


@pytest.fixture
def refused(tmp_path):
    """A function that asserts that bytes, or a path, are refused in one short sentence."""

    def check(data, load=load_checkpoint) -> str:
        path = data
        if isinstance(data, bytes):
            path = tmp_path / "bad.pt"
            path.write_bytes(data)
        with pytest.raises(BadInput, match=f"^{path}[^\n]*$") as caught:
            load(path)
        return str(caught.value)

    return check


# ---- what is written


def test_everything_comes_back_as_it_was_saved(fields, tmp_path):
    save_checkpoint(tmp_path / "again.pt", fields)
    again = load_checkpoint(tmp_path / "again.pt")
    assert set(again) == {*FIELDS, "weights_sha256"}
    assert state_sha256(again) == state_sha256(fields)
    assert again["weights_sha256"] == weights_sha256(fields["averaged"])


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_torch_opens_it_with_weights_only(quick_run, name):
    checkpoint = torch.load(quick_run / name, weights_only=True)
    assert (checkpoint["kind"], checkpoint["schema"]) == (KIND, SCHEMA)
    assert set(FIELDS) <= set(checkpoint)


def test_weights_sha256_is_the_documented_digest_of_the_raw_weights(quick_run):
    state = torch.load(quick_run / "last.pt", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    assert weights_sha256(state) == digest.hexdigest()


def test_weights_sha256_sees_name_dtype_shape_and_bytes_but_not_order_or_memory_layout():
    state = {"b": torch.arange(96.0).view(2, 3, 4, 4), "a": torch.zeros(2)}
    one = weights_sha256(state)
    laid_out = {"a": state["a"], "b": state["b"].to(memory_format=torch.channels_last)}
    assert weights_sha256(laid_out) == one
    others = [
        {"b": state["b"], "c": state["a"]},
        {**state, "a": torch.zeros(2, dtype=torch.int32)},
        {**state, "a": torch.zeros(1, 2)},
        {**state, "a": torch.tensor([0.0, -0.0])},
    ]
    assert len({one, *map(weights_sha256, others)}) == 5


def test_an_existing_checkpoint_survives_a_save_that_fails(fields, tmp_path):
    save_checkpoint(tmp_path / "last.pt", fields)
    with pytest.raises(Exception, match="pickle|lambda"):
        save_checkpoint(tmp_path / "last.pt", {**fields, "metrics": lambda: 0})
    assert state_sha256(load_checkpoint(tmp_path / "last.pt")) == state_sha256(fields)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


# ---- what is read


def test_the_model_comes_back_with_the_averaged_weights_ready_to_predict(quick_run, fields):
    model, cfg, checkpoint = load_model(quick_run)
    assert cfg.as_dict() == fields["config"] and not model.training
    assert weights_sha256(model.state_dict()) == weights_sha256(fields["averaged"])
    assert weights_sha256(fields["averaged"]) != weights_sha256(fields["model"])
    assert checkpoint["optimizer"] is None
    assert not any(parameter.requires_grad for parameter in model.parameters())


def save_raw(path, fields: dict, schema) -> Path:
    """Write a checkpoint as a program of another schema did."""
    header = {"kind": KIND, "schema": schema, "sha256": state_sha256(fields)}
    torch.save(header | fields, path)
    return path


@pytest.mark.parametrize("schema", range(1, SCHEMA))
def test_older_schemas_are_read_and_their_last_layer_computes_as_it_did(schema, fields, tmp_path):
    digest = fields.pop("weights_sha256")
    del fields["float32_logits"]
    _, _, checkpoint = load_model(save_raw(tmp_path / "old.pt", fields, schema))
    assert checkpoint["float32_logits"] is False and checkpoint["weights_sha256"] == digest


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, None])
def test_another_schema_is_refused_with_the_ones_that_are_read(schema, fields, tmp_path, refused):
    path = save_raw(tmp_path / "newer.pt", fields, schema)
    assert f"schema {schema}, this program reads 1 to {SCHEMA}" in refused(path)


def test_weights_are_those_that_were_evaluated_or_what_others_saved(quick_run, fields, tmp_path):
    assert state_sha256(load_weights(quick_run / "last.pt")) == state_sha256(
        load_checkpoint(quick_run / "last.pt")["averaged"]
    )
    others = {f"module.{name}": tensor for name, tensor in fields["averaged"].items()}
    torch.save({"state_dict": others, "epoch": 3}, tmp_path / "others.pt")
    assert state_sha256(load_weights(tmp_path / "others.pt")) == state_sha256(fields["averaged"])


def test_a_run_without_a_finished_epoch_has_no_model(tmp_path, refused):
    assert "no best.pt" in refused(tmp_path, load_model)


# ---- what is refused


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.5, 0.99])
def test_a_cut_file_is_refused_wherever_it_was_cut(best, refused, share):
    data = best.read_bytes()
    refused(data[: int(len(data) * share)])


def test_a_flipped_bit_is_refused_or_changes_nothing(best, fields, tmp_path, refused):
    data, path = best.read_bytes(), tmp_path / "flipped.pt"

    def flip(place: int) -> None:
        altered = bytearray(data)
        altered[place] ^= 4
        path.write_bytes(altered)

    mean = next(name for name in fields["model"] if name.endswith("running_mean"))
    flip(data.index(fields["model"][mean].numpy().tobytes()))
    refused(path)
    refused(path, load_weights)  # of which others write no checksum
    for place in random.Random(0).sample(range(len(data)), 30):
        flip(place)
        with contextlib.suppress(BadInput):
            assert state_sha256(load_checkpoint(path)) == state_sha256(fields)


class Code:
    """A pickle of this makes a folder when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_never_run(tmp_path, refused, fields):
    code = Code(tmp_path / "code-was-run")
    torch.save({"model": code}, tmp_path / "zip.pt")
    torch.save({"model": code}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({**fields, "kind": KIND, "metrics": {"a": code}}, tmp_path / "own.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(code))
    for name in ("zip.pt", "old.pt", "own.pt", "module.pt", "raw.pt"):
        assert "code" in refused(tmp_path / name)
        refused(tmp_path / name, load_weights)
    assert not code.path.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())  # noqa: S301 (our own)
    assert code.path.exists(), "a careless reader runs it"


def test_what_is_no_checkpoint_is_refused(tmp_path, refused):
    for value in ([1, 2], {"state_dict": {"a": torch.zeros(2)}}, torch.ones(3)):
        torch.save(value, tmp_path / "other.pt")
        assert "train.py weights=" in refused(tmp_path / "other.pt"), "weights are of use there"
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(200), b"hello\n" * 99, b"PK\3\4" * 99, b"\x80\x02."):
        refused(data)
    refused(tmp_path)
    refused(tmp_path / "none.pt")


def test_a_safetensors_file_is_told_what_is_read_instead(tmp_path, refused):
    (tmp_path / "model.safetensors").write_bytes(bytes(200))
    assert "torch.save" in refused(tmp_path / "model.safetensors", load_weights)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"p4m_width": 4}, "another model: the tensor"),
        ({"model": "mlp"}, "another model: the tensor"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"lr": "fast"}, "lr"),
    ],
)
def test_a_config_that_is_not_the_weights_own_is_refused(changes, named, fields, tmp_path):
    path = tmp_path / "other.pt"
    save_checkpoint(path, {**fields, "config": fields["config"] | changes})
    with pytest.raises(BadInput, match=f"^{path}.*{named}"):
        load_model(path)
