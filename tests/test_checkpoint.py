"""A checkpoint comes back as it was saved or is refused in one sentence: cut, altered, foreign,
newer or with code in it.
"""

import hashlib
import os
import pickle

import pytest
import torch
from conftest import make_old

from lib.checkpoint import (
    FIELDS,
    KIND,
    SCHEMA,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
    weights_sha256,
)
from lib.command import BadInput


@pytest.fixture
def fields(quick_run):
    """What save_checkpoint takes, of a good checkpoint."""
    return load_checkpoint(quick_run / "best.pt")


def assert_refused(path, words="", load=load_checkpoint) -> None:
    """Assert that a file is refused in one sentence that names it."""
    with pytest.raises(BadInput, match=f"^[^\n]*{path}[^\n]*{words}[^\n]*$"):
        load(path)


def test_everything_comes_back_as_it_was_saved(fields, tmp_path):
    path = tmp_path / "again.pt"
    save_checkpoint(path, fields)
    again = load_checkpoint(path)
    assert set(again) == {*FIELDS, "weights_sha256"}
    assert again["progress"] == fields["progress"] and again["config"] == fields["config"]
    model, _, _ = load_model(path)
    assert weights_sha256(model.state_dict()) == again["weights_sha256"]
    assert again["weights_sha256"] == weights_sha256(fields["averaged"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert weights_sha256(load_weights(path)) == again["weights_sha256"]
    torch.save({"epoch": 3, "state_dict": fields["averaged"]}, path)
    assert weights_sha256(load_weights(path)) == again["weights_sha256"], "of another program"


def test_torch_opens_it_with_weights_only_and_the_digest_is_the_documented_one(quick_run):
    checkpoint = torch.load(quick_run / "last.pt", weights_only=True)
    assert set(checkpoint) == {"kind", "schema", *FIELDS}
    digest, state = hashlib.sha256(), checkpoint["model"]
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    assert weights_sha256(state) == digest.hexdigest()
    assert weights_sha256(dict(reversed(state.items()))) == digest.hexdigest()


def test_older_schemas_are_read_and_a_newer_one_is_refused(fields, tmp_path):
    path = tmp_path / "other.pt"
    save_checkpoint(path, fields)
    make_old(path)
    _, _, checkpoint = load_model(path)
    assert checkpoint["float32_logits"] is False
    assert checkpoint["weights_sha256"] == fields["weights_sha256"]
    torch.save({"kind": KIND, "schema": SCHEMA + 1, **fields}, path)
    assert_refused(path, f"schema {SCHEMA + 1}, this program reads 1 to {SCHEMA}")


def test_a_cut_file_and_a_flipped_bit_are_refused(quick_run, fields, tmp_path):
    data, path = (quick_run / "best.pt").read_bytes(), tmp_path / "bad.pt"
    for share in (0, 1e-5, 0.5, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        assert_refused(path)
    mean = next(name for name in fields["model"] if name.endswith("running_mean"))
    weights = fields["model"][mean].numpy().tobytes()
    path.write_bytes(data.replace(weights, bytes([weights[0] ^ 4]) + weights[1:]))
    assert_refused(path, "damaged")


class Code:
    """A pickle of this makes a folder when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_never_run(tmp_path, fields):
    code = Code(tmp_path / "code-was-run")
    torch.save({**fields, "kind": KIND, "progress": {"a": code}}, tmp_path / "own.pt")
    torch.save({"model": code}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(code))
    for name in ("own.pt", "old.pt", "raw.pt"):
        assert_refused(tmp_path / name, "code")
        assert_refused(tmp_path / name, "code", load_weights)
    assert not code.path.exists()


def test_what_is_no_checkpoint_or_has_another_models_config_is_refused(tmp_path, fields):
    assert_refused(tmp_path, "best.pt", load_model)
    path = tmp_path / "other.pt"
    path.write_bytes(b"hello\n" * 99)
    assert_refused(path)
    torch.save(fields["averaged"], path)
    assert_refused(path, "train.py weights=")
    torch.save([1], path)
    assert_refused(path, "no dict that torch.save wrote", load_weights)
    for changes, words in (
        ({"p4m_width": 4}, "another model: size mismatch"),
        ({"colour": 1}, "unknown key 'colour'"),
    ):
        save_checkpoint(path, {**fields, "config": fields["config"] | changes})
        assert_refused(path, words, load_model)
