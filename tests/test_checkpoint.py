"""A checkpoint comes back as it was saved or is refused in one sentence: cut, altered, foreign,
newer or with code in it.
"""

import hashlib
import os
import random
import re
import resource
from pathlib import Path

import pytest
import torch

from lib.checkpoint import (
    FIELDS,
    KIND,
    SCHEMA,
    load_checkpoint,
    load_model,
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
    """A function that asserts that bytes, or a path, are refused in one short sentence, and gives
    it.
    """

    def check(data, load=load_checkpoint) -> str:
        path = data
        if isinstance(data, bytes):
            path = tmp_path / "bad.pt"
            path.write_bytes(data)
        with pytest.raises(BadInput) as caught:
            load(path)
        sentence = str(caught.value)
        assert (
            str(path) in sentence and "\n" not in sentence and len(sentence) < 400 + len(str(path))
        )
        return sentence

    return check


def test_everything_comes_back_as_it_was_saved(fields, tmp_path):
    save_checkpoint(tmp_path / "again.pt", fields)
    again = load_checkpoint(tmp_path / "again.pt")
    assert again.pop("weights_sha256") == weights_sha256(fields["averaged"])
    assert again.keys() == FIELDS.keys() and state_sha256(again) == state_sha256(
        {name: fields[name] for name in FIELDS}
    )


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_torch_opens_it_with_weights_only(quick_run, name):
    checkpoint = torch.load(quick_run / name, weights_only=True)
    assert (
        checkpoint["kind"] == KIND
        and checkpoint["schema"] == SCHEMA
        and FIELDS.keys() <= checkpoint.keys()
    )


def test_weights_sha256_is_the_documented_digest_of_the_raw_weights(quick_run):
    state = torch.load(quick_run / "last.pt", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            + tensor.contiguous().numpy().tobytes()
        )
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


def test_a_cut_file_is_refused_wherever_it_was_cut(best, refused):
    data = best.read_bytes()
    assert "empty" in refused(b"")
    for length in (
        1,
        2,
        100,
        4096,
        len(data) // 2,
        len(data) - 1000,
        len(data) - 22,
        len(data) - 1,
    ):
        refused(data[:length])


def test_a_flipped_bit_is_refused_or_changes_nothing(best, fields, tmp_path):
    data, good = best.read_bytes(), state_sha256(fields)
    statistics = next(
        tensor for name, tensor in fields["model"].items() if name.endswith("running_mean")
    )
    inside = data.index(statistics.numpy().tobytes())  # certainly in a tensor
    random.seed(0)
    places = [inside, *random.sample(range(len(data)), 29)]
    num_refused = 0
    for place in places:
        altered = bytearray(data)
        altered[place] ^= 1 << random.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(altered)
        try:
            same = state_sha256(load_checkpoint(tmp_path / "flipped.pt")) == good
        except BadInput as error:
            num_refused += 1
            assert "\n" not in str(error)
        else:
            assert same and place != inside, f"byte {place} was changed without notice"
    assert num_refused > 20, "most of the file is content"


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, refused, fields):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code-was-run"),)

    for number, value in enumerate(
        (Code(), {**fields, "kind": KIND, "schema": SCHEMA, "metrics": {"a": Code()}})
    ):
        torch.save(value, tmp_path / f"{number}.pt")
        assert "code" in refused(tmp_path / f"{number}.pt")
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": {"a": torch.zeros(2)}}, torch.zeros(3)])
def test_a_foreign_file_is_refused(value, tmp_path, refused):
    torch.save(value, tmp_path / "foreign.pt")
    assert "not a checkpoint of this program" in refused(tmp_path / "foreign.pt")
    says_what = "weights without the config of their model" in refused(tmp_path / "foreign.pt")
    assert says_what == isinstance(value, dict)
    refused(b"\x89PNG\r\n\x1a\n" + bytes(200))
    refused(tmp_path)


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_another_schema_is_refused_with_the_ones_that_are_read(schema, fields, tmp_path, refused):
    torch.save(
        {"kind": KIND, "schema": schema, "sha256": state_sha256(fields), **fields},
        tmp_path / "newer.pt",
    )
    assert f"schema {schema}, this program reads 1 to {SCHEMA}" in refused(tmp_path / "newer.pt")


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_or_wrong_field_is_named(name, fields, tmp_path, refused):
    wrong = {**fields, name: "text"}
    torch.save(
        {"kind": KIND, "schema": SCHEMA, "sha256": state_sha256(wrong), **wrong},
        tmp_path / "wrong.pt",
    )
    assert f"its {name} is of a wrong type" in refused(tmp_path / "wrong.pt")
    if type(None) not in (FIELDS[name] if isinstance(FIELDS[name], tuple) else ()):
        del fields[name]
        torch.save(
            {"kind": KIND, "schema": SCHEMA, "sha256": state_sha256(fields), **fields},
            tmp_path / "lacking.pt",
        )
        assert f"its {name} is missing" in refused(tmp_path / "lacking.pt")


def test_weights_of_another_model_are_refused_with_the_first_tensor_that_differs(
    fields, tmp_path, refused
):
    shape = r"\S+ has shape \([\d, ]+\) instead of \("
    for changes, what in (
        ({"p4m_width": 4}, shape),
        ({"model": "mlp"}, r"\S+ is (missing|unknown)"),
    ):
        save_checkpoint(tmp_path / "other.pt", {**fields, "config": fields["config"] | changes})
        assert re.search(
            f"another model: the tensor {what}", refused(tmp_path / "other.pt", load_model)
        )


def test_an_unknown_or_lacking_key_of_its_config_is_refused(fields, tmp_path, refused):
    save_checkpoint(tmp_path / "more.pt", {**fields, "config": fields["config"] | {"colour": 1}})
    with pytest.raises(BadInput, match="unknown key 'colour'"):  # and the list of all keys
        load_model(tmp_path / "more.pt")
    del fields["config"]["lr"]
    save_checkpoint(tmp_path / "less.pt", fields)
    assert "missing lr" in refused(tmp_path / "less.pt", load_model)


@pytest.mark.parametrize(
    "changes", [{"p4m_width": 100_000}, {"model": "mlp", "mlp_hidden": [10**6, 10**6]}]
)
def test_a_strangers_huge_model_takes_no_memory(changes, fields, tmp_path, refused):
    save_checkpoint(tmp_path / "huge.pt", {**fields, "config": fields["config"] | changes})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "of another model" in refused(tmp_path / "huge.pt", load_model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_model_beyond_all_bounds_is_refused(fields, tmp_path, refused):
    changes = {"model": "mlp", "mlp_hidden": [10**12, 10**12]}
    save_checkpoint(tmp_path / "beyond.pt", {**fields, "config": fields["config"] | changes})
    refused(tmp_path / "beyond.pt", load_model)


def test_a_strangers_tensor_that_is_larger_than_its_file_is_refused(fields, tmp_path, refused):
    # four bytes in the file, 400 TB when copied
    fields["model"] = {"0.weight": torch.zeros(1).expand(10**7, 10**7)}
    torch.save({"kind": KIND, "schema": SCHEMA, "sha256": "0", **fields}, tmp_path / "bomb.pt")
    refused(tmp_path / "bomb.pt")


@pytest.mark.parametrize("preprocessing", [{}, {"mean": [0.5], "std": "x"}])
def test_a_preprocessing_that_cannot_be_applied_is_refused(
    preprocessing, fields, tmp_path, refused
):
    save_checkpoint(tmp_path / "odd.pt", {**fields, "preprocessing": preprocessing})
    refused(tmp_path / "odd.pt", load_model)


def test_the_model_comes_back_with_the_averaged_weights_ready_to_predict(quick_run, fields):
    model, cfg, checkpoint = load_model(quick_run)
    assert cfg.as_dict() == fields["config"] and not model.training
    assert (
        weights_sha256(model.state_dict())
        == weights_sha256(fields["averaged"])
        != weights_sha256(fields["model"])
    )
    assert checkpoint["optimizer"] is None and not any(
        parameter.requires_grad for parameter in model.parameters()
    )


def test_an_existing_checkpoint_survives_a_save_that_fails(fields, tmp_path):
    save_checkpoint(tmp_path / "last.pt", fields)
    with pytest.raises(Exception, match="pickle|lambda"):
        save_checkpoint(tmp_path / "last.pt", {**fields, "metrics": lambda: 0})
    assert state_sha256(load_checkpoint(tmp_path / "last.pt")) == state_sha256(fields)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_without_a_finished_epoch_has_no_model(tmp_path, refused):
    assert "no best.pt" in refused(tmp_path, load_model)
