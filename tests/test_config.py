"""A section is checked against the signature it configures: each mistake names its field and the way out."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import ml_collections
import pytest
from ml_collections import config_dict

from sslx import config
from sslx.config import Count, Natural, Only, Part, Positive, Share, UserError
from sslx.data import Info


def make(model, *, width: int, rate: float = 0.1, kind: Literal["layer", "rms"] = "layer", flag: bool = False,
         hidden: int | None = None, scale: tuple[float, float] = (0.2, 1.0), stages: tuple[int, ...] = (2, 2),
         view: dict[str, Any] | None = None, label: str = ""):
    return dict(model=model, width=width, rate=rate, kind=kind, flag=flag, hidden=hidden, scale=scale, stages=stages,
                view=view, label=label)


def call(**section):
    return config.call(make, ml_collections.ConfigDict(section), "config.model", model="given", unused="dropped")


def test_the_section_and_what_is_given_arrive_and_defaults_stay():
    made = call(name="some_file", width=8, view=dict(size=4))
    assert made | dict(view=None) == make("given", width=8)
    assert dict(made["view"]) == {"size": 4}


@pytest.mark.parametrize("key, value, expected", [
    ("rate", 1, 1.0), ("rate", 0.5, 0.5), ("hidden", None, None), ("hidden", 3, 3), ("scale", [0, 1], (0.0, 1.0)),
    ("stages", [3, 4, 6, 3], (3, 4, 6, 3)), ("kind", "rms", "rms"), ("flag", True, True),
])
def test_values_that_fit(key, value, expected):
    got = call(**{"width": 8, key: value})[key]
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("key, value, message", [
    ("width", "8", "config.model.width is '8'; it takes an integer"),
    ("width", 8.0, "config.model.width is 8.0; it takes an integer"),
    ("width", True, "config.model.width is True; it takes an integer"),
    ("width", None, "config.model.width is None; it takes an integer"),
    ("rate", "0.1", "config.model.rate is '0.1'; it takes a finite number"),
    ("rate", True, "config.model.rate is True; it takes a finite number"),
    ("flag", 1, "config.model.flag is 1; it takes True or False"),
    ("label", 3, "config.model.label is 3; it takes a string"),
    ("hidden", 2.5, "config.model.hidden is 2.5; it takes an integer or None"),
    ("kind", "rsm", "config.model.kind is 'rsm'; it takes one of 'layer', 'rms': did you mean 'rms'?"),
    ("kind", 3, "config.model.kind is 3; it takes one of 'layer', 'rms'"),
    ("scale", (0.1, 0.2, 0.3), "(0.1, 0.2, 0.3); it takes a tuple of a finite number and a finite number"),
    ("scale", 0.5, "config.model.scale is 0.5; it takes a tuple of"),
    ("scale", (0.1, "1"), "config.model.scale[1] is '1'; it takes a finite number"),
    ("stages", (2, 2.5), "config.model.stages[1] is 2.5; it takes an integer"),
    ("view", 3, "config.model.view is 3; it takes a section"),
])
def test_values_of_another_type_are_named_with_what_fits(key, value, message):
    with pytest.raises(UserError) as error:
        config.call(make, {"width": 8, key: value}, "config.model", model=None)
    assert message in str(error.value)


def test_an_unknown_key_is_named_with_the_nearest_and_all_valid_ones():
    with pytest.raises(UserError, match=r"unknown key config.model.widht: did you mean 'width'\? \(valid: width, rate"):
        call(width=8, widht=9)
    with pytest.raises(UserError, match=r"unknown key config.model.zzzz \(valid: width, rate"):
        call(width=8, zzzz=9)


def test_what_is_given_cannot_be_configured():
    with pytest.raises(UserError, match="unknown key config.model.model"):
        call(width=8, model="mine")


def test_a_missing_key_is_named_with_its_type():
    with pytest.raises(UserError, match="config.model.width is missing: it takes an integer"):
        call(rate=0.5)


class Options(NamedTuple):
    steps: int
    train: Mapping
    seed: int = 0


def test_a_named_tuple_is_a_schema_too():
    assert config.call(Options, dict(steps=3, train={}), "config.run") == Options(3, {})
    with pytest.raises(UserError, match="config.run.train is 4; it takes a section"):
        config.call(Options, dict(steps=3, train=4), "config.run")
    with pytest.raises(UserError, match="config.run.steps is missing"):
        config.call(Options, dict(train={}), "config.run")


def test_nested_sections_are_named_in_full():
    objective = dict(name="simclr", view=dict(size=8, scael=(0.1, 1.0)))
    model = config.build("models", dict(name="resnet"), "config.model")
    with pytest.raises(UserError, match=r"unknown key config.objective.view.scael: did you mean 'scale'\?"):
        config.build("objectives", objective, "config.objective", model=model, info=Info("", "image", ""))


def test_what_is_built_of_one_section_must_fit_another():
    model = config.build("models", dict(name="resnet"), "config.model")
    with pytest.raises(UserError, match="config.objective.name='mae' takes a model that is a VisionTransformer, and"
                                        " config.model makes a ResNet"):
        config.build("objectives", dict(name="mae", view={}), "config.objective", model=model, info=None)


@pytest.mark.parametrize("hint, fitting, others", [
    (Count, [1, 2**31 - 1], [0, -1, 2**31, 1.0, True, "1", None]),
    (Natural, [0, 5], [-1, 2**31, 0.0]),
    (float, [-1, 0.5, 3.4e38], [math.nan, math.inf, -math.inf, 1e39, 10**400, True, "1"]),
    (Positive, [1e-9, 3], [0, -1.0, math.nan, math.inf]),
    (Share, [0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
    (Part, [0.1], [0, 1, 0.0, 1.0]),
    (Count | None, [None, 1], [0, "None"]),
    (tuple[Count, ...], [(1,), [2, 3]], [(), 1, (1, 0)]),
    (Annotated[tuple[float, float], Only(lambda r: r[0] < r[1], "an interval")], [(0, 1)], [(1, 0), (0,), (0, "1")]),
    (Literal[1, "a"], [1, "a"], [True, 1.0, "b", [1], {}]),
])
def test_an_annotation_has_a_range(hint, fitting, others):
    for value in fitting:
        config.checked(value, hint, "config.a")
    for value in others:
        with pytest.raises(UserError, match=r"config\.a(\[1\])? is .*; it takes "):
            config.checked(value, hint, "config.a")


def test_a_required_field_that_no_flag_has_set_is_named():
    section = ml_collections.ConfigDict(dict(model=dict(width=config_dict.required_placeholder(int))))
    with pytest.raises(UserError, match="config.model.width is missing: .* --config.model.width=VALUE"):
        config.plain(section)
    section.model.width = 3
    assert config.plain(section) == {"model": {"width": 3}}


def test_secrets_are_not_written_down():
    conf = dict(data=dict(path="s3://me:hunter2@host/x", hf_token="abc", limit=3, tokenizer="bytes", tokens="t",
                          api_key=12, auth=dict(user="u"), sources=["http://pw@h/p"], password=None, secret_key=1,
                          auth_token=True))
    kept = dict(path="s3://***@host/x", hf_token="***", limit=3, tokenizer="bytes", tokens="t", api_key="***",
                auth="***", sources=["http://***@h/p"], password=None, secret_key="***",
                auth_token=True)
    assert config.redacted(conf) == dict(data=kept)
    assert config.redacted(config.redacted(conf)) == dict(data=kept)


def test_secrets_are_not_told_in_errors():
    assert "hunter2" not in str(UserError("there is nothing at s3://me:hunter2@host/x"))
    with pytest.raises(UserError) as error:
        config.checked(["hunter2"], str, "config.data.password")
    assert str(error.value) == "config.data.password is '***'; it takes a string"


@pytest.mark.parametrize("section, message", [
    (dict(name="resent"), r"there is no 'resent' in sslx/models: did you mean 'resnet'\?"),
    (dict(width=3), "config.model.name is missing: it names a file of sslx/models"),
    ("resnet", "config.model is 'resnet'; it takes a section with a name of sslx/models"),
    (dict(name="heads"), "there is no 'heads' in sslx/models"),
])
def test_a_section_names_a_file_that_can_be_made(section, message):
    with pytest.raises(UserError, match=message):
        config.build("models", section, "config.model")


def test_a_name_leads_to_the_file():
    assert config.build("models", dict(name="resnet", stages=[1], dtype="float32"), "config.model").stages == (1,)
