"""The configuration: typed, complete, frozen, and strict where YAML and the shell are lenient."""

import dataclasses
import re

import pytest
from conftest import REPOSITORY

from lib.command import BadInput
from lib.config import (
    DEFAULT_PATH,
    FREE_KEYS,
    Config,
    config_from_dict,
    dump_config,
    load_config,
)
from lib.files import read_json
from lib.rundir import read_run_config

LINES = [line for line in DEFAULT_PATH.read_text().splitlines() if re.match(r"\w", line)]
CHAMPION = REPOSITORY / "assets" / "champion"


def test_config_yaml_has_each_key_with_a_comment_and_the_code_has_no_default():
    fields = dataclasses.fields(Config)
    assert [line.partition(":")[0] for line in LINES] == [field.name for field in fields]
    assert {field.default for field in fields} == {dataclasses.MISSING}
    assert all(re.search(r" # \S", line) for line in LINES)


def test_what_a_file_leaves_out_is_as_in_config_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("batch_size: 128\nlr: 1e-3\n")
    expected = dataclasses.replace(load_config(), batch_size=128, lr=1e-3, seed=7)
    assert load_config(path, ["seed=7"]) == expected
    path.write_text("batchsize: 128\n")
    with pytest.raises(BadInput, match="unknown key 'batchsize', did you mean 'batch_size'"):
        load_config(path)
    gpu = load_config(REPOSITORY / "config-gpu.yaml")
    assert gpu.batch_size > load_config().batch_size and gpu.model == load_config().model


def test_a_value_of_the_wrong_type_or_size_is_refused_by_name():
    for key, values in {
        "epochs": ["1.5", "0", "nan", "inf", "true", "", "ten", True, [3], None],
        "seed": ["-1", "2147483648"],
        "lr": ["0", "-1", "nan", "inf", "fast"],
        "symmetries": ["2", ""],
        "model": ["resnet", {}],
        "mlp_hidden": ["0", "1,x"],
        "quarantine_reasons": ["nan,dark"],
        "shards": ["3"],
        "num_folds": ["1"],
        "name": ["", "a/b"],
    }.items():
        for value in values:
            with pytest.raises(BadInput, match=key):
                config_from_dict(load_config().as_dict() | {key: value})


def test_a_value_is_read_as_meant(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    for key, value, meaning in (
        ("mlp_hidden", "256,128", (256, 128)),
        ("mlp_hidden", 256, (256,)),
        ("mlp_hidden", "", ()),
        ("quarantine_reasons", [float("nan"), "range"], ("nan", "range")),  # YAML's [.nan, range]
        ("lr", ".1e-2", 1e-3),
        ("epochs", "1e3", 1000),
        ("symmetries", "False", False),
        ("deterministic", True, True),
        ("views", "1", 1),
        ("name", 3, "3"),
        ("weights", None, ""),
        ("weights", "~/w.pt", "/home/me/w.pt"),  # as the shell would, which sees neither
        ("data_dir", "$SCRATCH/pcam", "/scratch/me/pcam"),  # YAML nor quoted ARGS
    ):
        cfg = config_from_dict(load_config().as_dict() | {key: value})
        assert getattr(cfg, key) == meaning and type(getattr(cfg, key)) is type(meaning)


def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path):
    # the last one looks like a date that is none
    for text in ("seed: [1", "- seed", "", "name: !!python/object/apply:x []", "name: 2024-13-45"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(BadInput, match=r"c\.yaml.*(YAML|key: value)"):
            load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["yes", "1e-3", "null", "~", "#1", "a: b", '"', "ü—漢", "nan"])
def test_dump_and_load_give_an_equal_config(text, tmp_path):
    cfg = load_config(overrides=["lr=1e-3", "mlp_hidden=64,32", "quarantine_reasons=nan,leak"])
    cfg = dataclasses.replace(cfg, name=text, data_dir=f"/data/{text} ")
    (tmp_path / "c.yaml").write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == cfg


def test_the_identity_leaves_out_the_keys_marked_free_and_no_other():
    marked = {line.partition(":")[0] for line in LINES if "# (free" in line}
    cfg = load_config()
    assert marked == set(FREE_KEYS) == set(cfg.as_dict()) - set(cfg.identity())
    meta = read_json(CHAMPION / "meta.json")
    cfg = dataclasses.replace(read_run_config(CHAMPION), name="b", views=1)
    assert cfg.identity_digest(meta["data"]) == meta["identity"], "that of an old run stays"
