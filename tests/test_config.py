"""The configuration: typed, complete, frozen, and strict where YAML and the shell are lenient."""

import dataclasses
import re

import pytest

from lib.command import BadInput
from lib.config import (
    DEFAULT_PATH,
    Config,
    change_free_keys,
    config_from_dict,
    dump_config,
    load_config,
    parse_overrides,
)

LINES = [line for line in DEFAULT_PATH.read_text().splitlines() if re.match(r"\w", line)]
FREE = {
    "name",
    "data_dir",
    "data_residence",
    "eval_batch_size",
    "views",
    "threshold_rule",
    "least_recall",
    "false_negative_cost",
    "checkpoint_every_steps",
}
REFUSED = {
    "epochs": ["1.5", "0", "nan", "inf", "true", "", "ten"],
    "seed": ["-1", "2147483648"],
    "lr": ["0", "-1", "nan", "inf", "fast", "1e999"],
    "symmetries": ["2", "on", "", "1.0"],
    "model": ["CNN", "resnet"],
    "views": ["2", "true"],
    "mlp_hidden": ["0", "1,x"],
    "quarantine_reasons": ["nan,dark"],
    "threads": ["auto", "-1", "1025"],
    "shards": ["3"],
    "num_folds": ["1"],
    "name": ["", "a/b"],
}


def test_config_yaml_has_each_declared_key_in_its_order_with_a_comment_and_no_default_hides_in_the_code():
    assert [line.partition(":")[0] for line in LINES] == [
        field.name for field in dataclasses.fields(Config)
    ]
    assert all(
        field.default is field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(Config)
    )
    assert [line for line in LINES if not re.search(r" # \S", line)] == [], "each key has a comment"


def test_a_missing_key_is_named():
    for key in load_config().as_dict():
        with pytest.raises(BadInput, match=f"missing {key}"):
            config_from_dict({k: v for k, v in load_config().as_dict().items() if k != key})


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", ".1e-2"])
def test_a_number_is_a_number_from_yaml_and_from_the_shell(text, tmp_path):
    (tmp_path / "c.yaml").write_text(re.sub("(?m)^lr:.*", f"lr: {text}", DEFAULT_PATH.read_text()))
    assert load_config(tmp_path / "c.yaml").lr == load_config(overrides=[f"lr={text}"]).lr == 1e-3


@pytest.mark.parametrize(
    "misspelt, hint", [("qqqq", "allowed: name, seed"), ("batchsize", "did you mean 'batch_size'")]
)
def test_an_unknown_key_is_refused_with_the_nearest_or_all(misspelt, hint, tmp_path):
    (tmp_path / "c.yaml").write_text(DEFAULT_PATH.read_text() + f"\n{misspelt}: 3\n")
    for arguments in ([tmp_path / "c.yaml"], [DEFAULT_PATH, [f"{misspelt}=3"]]):
        with pytest.raises(BadInput, match=f"'{misspelt}'.*{hint}"):
            load_config(*arguments)


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_of_the_wrong_type_or_size_is_refused_by_name(key):
    for value in REFUSED[key]:
        with pytest.raises(BadInput, match=key):
            load_config(overrides=[f"{key}={value}"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("epochs", True),
        ("lr", True),
        ("epochs", [3]),
        ("name", ["a"]),
        ("model", {}),
        ("seed", None),
    ],
)
def test_yaml_types_are_not_mistaken_for_each_other(key, value):
    with pytest.raises(BadInput, match=f"config key {key}"):
        config_from_dict(load_config().as_dict() | {key: value})


def test_lists_and_large_integers_are_read_as_meant():
    for text in ("256,128", "[256, 128]", "256 128", " 256 , 128 "):
        assert load_config(overrides=[f"mlp_hidden={text}"]).mlp_hidden == (256, 128)
    assert load_config(overrides=["mlp_hidden="]).mlp_hidden == ()
    assert (
        load_config(overrides=["limit_train=9007199254740993", "epochs=1e3"]).limit_train
        == 9007199254740993
    )
    assert load_config(overrides=["dropout=0.95"]).dropout == 0.95, "a bound is allowed, to the bit"
    reasons = {"quarantine_reasons": [float("nan"), "range"]}  # what YAML makes of [.nan, range]
    assert config_from_dict(load_config().as_dict() | reasons).quarantine_reasons == (
        "nan",
        "range",
    )


@pytest.mark.parametrize(
    "text, problem",
    [
        ("seed: 1\nseed: 2\n", "'seed' stands there twice"),
        ("seed: [1\n", "not valid YAML, line"),
        ("- seed\n", "must hold"),
        ("", "must hold"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("name: 2024-13-45\n", "not valid YAML"),  # looks like a date that is none
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(text, problem, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BadInput, match=rf"c\.yaml.*{problem}"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("pairs", [["lr"], ["lr=1", "lr=2"], ["lr=1", "lr =2"]])
def test_overrides_are_key_value_pairs_each_given_once(pairs):
    with pytest.raises(BadInput):
        parse_overrides(pairs)


@pytest.mark.parametrize(
    "text",
    ["pcam", "yes", "1e-3", "012", "null", "~", "3", "#1", "a: b", "'", '"', "ü—漢", "!x", "nan"],
)
def test_dump_and_load_give_an_equal_config(text, tmp_path):
    cfg = load_config(
        overrides=["lr=1e-3", "mlp_hidden=64,32", "quarantine_reasons=nan,leak", "symmetries=false"]
    )
    cfg = dataclasses.replace(cfg, name=text, data_dir=f"/data/{text} ", quarantine=text)
    (tmp_path / "c.yaml").write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == cfg == config_from_dict(cfg.as_dict())


def test_a_config_is_frozen_and_its_identity_leaves_out_the_free_keys_alone(tmp_path):
    cfg = load_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 2
    assert (
        {line.partition(":")[0] for line in LINES if "# (free" in line}
        == FREE
        == set(cfg.as_dict()) - set(cfg.identity())
    )
    free = dataclasses.replace(
        cfg, name="b", data_dir="/e", data_residence="disk", eval_batch_size=1, views=8
    )
    others = [
        {"seed": 2},
        {"threads": 1},
        {"lr": 0.1},
        {"symmetries": False},
        {"mlp_hidden": (1,)},
        {"precision": "fp32"},
    ]
    digests = {dataclasses.replace(cfg, **change).identity_digest({}) for change in others} | {
        cfg.identity_digest({"x": "0"})
    }
    assert (
        free.identity_digest({}) == cfg.identity_digest({}) not in digests
        and len(digests) == len(others) + 1
    )
    folds = dataclasses.replace(cfg, num_folds=2)
    assert folds.identity_digest({}, "1") != folds.identity_digest({}, "2")
    assert cfg.identity_digest({}, "1") == cfg.identity_digest({}, "2"), "no row moves by them"
    # what a quarantine file holds counts, not where it lies
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    a, b, c = (
        dataclasses.replace(cfg, quarantine=str(tmp_path / name)).identity_digest({})
        for name in "abc"
    )
    assert a == b != c


def test_a_resumed_run_may_change_free_keys_alone():
    cfg = load_config()
    changed = change_free_keys(cfg, {"views": "8", "data_dir": "/elsewhere", "lr": "0.020"})
    assert changed == dataclasses.replace(cfg, views=8, data_dir="/elsewhere"), (
        "an equal value in other words is no change"
    )
    for change, words in (
        ({"seed": "2"}, "seed changes the weights.*views"),
        ({"sed": "2"}, "did you mean 'seed'"),
    ):
        with pytest.raises(BadInput, match=words):
            change_free_keys(cfg, {"views": "8"} | change)
