"""A checkpoint comes back as it was saved or is refused in one sentence: cut, altered, foreign,
newer or with code in it.
"""

import hashlib
import os
import pickle
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


def assert_refused(path, words="", load=load_checkpoint) -> None:
    """Assert that a file is refused in one sentence that begins with its path."""
    with pytest.raises(BadInput, match=f"^{path}[^\n]*{words}[^\n]*$"):
        load(path)


def test_everything_comes_back_as_it_was_saved(fields, tmp_path):
    save_checkpoint(tmp_path / "again.pt", fields)
    again = load_checkpoint(tmp_path / "again.pt")
    assert set(again) == {*FIELDS, "weights_sha256"}
    assert state_sha256(again) == state_sha256(fields)
    assert again["weights_sha256"] == weights_sha256(fields["averaged"])
    model, _, _ = load_model(tmp_path / "again.pt")
    assert weights_sha256(model.state_dict()) == again["weights_sha256"]
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_torch_opens_it_with_weights_only_and_the_digest_is_the_documented_one(quick_run):
    for name in ("best.pt", "last.pt"):
        checkpoint = torch.load(quick_run / name, weights_only=True)
        assert (checkpoint["kind"], checkpoint["schema"]) == (KIND, SCHEMA)
        assert set(FIELDS) <= set(checkpoint)
    digest, state = hashlib.sha256(), checkpoint["model"]
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    assert weights_sha256(state) == digest.hexdigest()


def test_weights_sha256_sees_name_dtype_shape_and_bytes_but_not_order_or_memory_layout():
    b, zeros = torch.arange(96.0).view(2, 3, 4, 4), torch.zeros(2)
    one = weights_sha256({"b": b, "a": zeros})
    assert weights_sha256({"a": zeros, "b": b.to(memory_format=torch.channels_last)}) == one
    others = [{"b": b, "c": zeros}, {"b": b, "a": zeros.int()}, {"b": b, "a": zeros[None]}]
    others.append({"b": b, "a": torch.tensor([0.0, -0.0])})
    assert len({one, *map(weights_sha256, others)}) == 5


def test_older_schemas_are_read_and_a_newer_one_is_refused(fields, tmp_path):
    digest, path = fields.pop("weights_sha256"), tmp_path / "other.pt"
    del fields["float32_logits"]
    for schema in range(1, SCHEMA + 2):
        header = {"kind": KIND, "schema": schema, "sha256": state_sha256(fields)}
        torch.save(header | fields, path)
        if schema <= SCHEMA:
            _, _, checkpoint = load_model(path)
            assert checkpoint["float32_logits"] is False
            assert checkpoint["weights_sha256"] == digest
    assert_refused(path, f"schema {SCHEMA + 1}, this program reads 1 to {SCHEMA}")


def test_weights_are_those_that_were_evaluated_or_what_others_saved(quick_run, fields, tmp_path):
    last, others = quick_run / "last.pt", tmp_path / "others.pt"
    averaged = load_checkpoint(last)["averaged"]
    assert state_sha256(load_weights(last)) == state_sha256(averaged)
    state = {f"module.{name}": tensor for name, tensor in fields["averaged"].items()}
    torch.save({"state_dict": state, "epoch": 3}, others)
    assert state_sha256(load_weights(others)) == state_sha256(fields["averaged"])
    assert_refused(others, "train.py weights=")


def test_a_cut_file_and_a_flipped_bit_are_refused(best, fields, tmp_path):
    data, path = best.read_bytes(), tmp_path / "bad.pt"
    for share in (0, 1e-5, 0.01, 0.5, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        assert_refused(path)
    mean = next(name for name in fields["model"] if name.endswith("running_mean"))
    weights = fields["model"][mean].numpy().tobytes()
    path.write_bytes(data.replace(weights, bytes([weights[0] ^ 4]) + weights[1:]))
    assert_refused(path, "checksum")


class Code:
    """A pickle of this makes a folder when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_never_run(tmp_path, fields):
    code = Code(tmp_path / "code-was-run")
    torch.save({"model": code}, tmp_path / "zip.pt")
    torch.save({"model": code}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({**fields, "kind": KIND, "metrics": {"a": code}}, tmp_path / "own.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(code))
    for name in ("zip.pt", "old.pt", "own.pt", "raw.pt"):
        assert_refused(tmp_path / name, "code")
        assert_refused(tmp_path / name, "code", load_weights)
    assert not code.path.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())  # noqa: S301 (our own)
    assert code.path.exists(), "a careless reader runs it"


def test_what_is_no_checkpoint_or_has_another_models_config_is_refused(tmp_path, fields):
    assert_refused(tmp_path, "no best.pt", load_model)
    assert_refused(tmp_path)
    assert_refused(tmp_path / "none.pt", "does not exist")
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(200))
    assert_refused(path, "torch.save", load_weights)
    path = tmp_path / "other.pt"
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(200), b"hello\n" * 99):
        path.write_bytes(data)
        assert_refused(path)
    for changes, words in (
        ({"p4m_width": 4}, "another model: the tensor"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"lr": "fast"}, "lr"),
    ):
        save_checkpoint(path, {**fields, "config": fields["config"] | changes})
        assert_refused(path, words, load_model)
