"""A config that cannot work is refused where it is made, with the arithmetic and the nearest value that can."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba2_min.config import Mamba2Config


def test_the_defaults_are_the_documented_ones():
    c = Mamba2Config(vocab_size=100)
    assert (c.d_model, c.n_layer, c.d_state, c.d_conv, c.expand, c.headdim) == (256, 4, 64, 4, 2, 64)
    assert (c.ngroups, c.chunk_size, c.a_init, c.dt_min, c.dt_max) == (1, 64, "hippo", 1e-3, 0.1)
    assert c.dropout == 0 and c.tie_embeddings


def test_the_derived_sizes():
    c = Mamba2Config(vocab_size=50, d_model=24, expand=3, headdim=9, ngroups=4, d_state=5, pad_vocab_size_multiple=16)
    assert c.d_inner == 72
    assert c.nheads == 8
    assert c.conv_dim == 72 + 2 * 4 * 5
    assert c.d_in_proj == 2 * 72 + 2 * 4 * 5 + 8
    assert c.padded_vocab_size == 64


@pytest.mark.parametrize(
    "values, words",
    [
        ({"headdim": 48}, ["headdim", "2 * 256 = 512", "48", "32"]),
        ({"headdim": 1000}, ["headdim", "512", "1000"]),
        ({"d_model": 100, "headdim": 64}, ["2 * 100 = 200", "64", "50"]),
        ({"ngroups": 3}, ["ngroups", "512 / 64 = 8", "3", "2"]),
        ({"ngroups": 100}, ["ngroups", "= 8", "100", "8"]),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_answered_with_the_arithmetic_and_a_good_value(values, words):
    with pytest.raises(ValueError) as error:
        Mamba2Config(vocab_size=100, **values)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    name = next(name for name in ("ngroups", "headdim") if message.startswith(name))
    Mamba2Config(vocab_size=100, **{**values, name: int(message.split()[-1])})  # what it advises works


@given(d_model=st.integers(1, 300), expand=st.integers(1, 4), headdim=st.integers(1, 400))
def test_the_advised_headdim_is_the_nearest_divisor(d_model, expand, headdim):
    d_inner = d_model * expand
    if d_inner % headdim == 0:
        assert Mamba2Config(vocab_size=1, d_model=d_model, expand=expand, headdim=headdim).nheads == d_inner // headdim
        return
    with pytest.raises(ValueError) as error:
        Mamba2Config(vocab_size=1, d_model=d_model, expand=expand, headdim=headdim)
    advised = int(str(error.value).split()[-1])
    assert d_inner % advised == 0
    assert all(abs(d - headdim) >= abs(advised - headdim) for d in range(1, d_inner + 1) if d_inner % d == 0)


WHOLE = (
    "vocab_size",
    "d_model",
    "n_layer",
    "d_state",
    "d_conv",
    "expand",
    "headdim",
    "ngroups",
    "chunk_size",
    "pad_vocab_size_multiple",
)
REAL = ("dt_min", "dt_max", "dt_init_floor", "dropout", "embedding_dropout", "variational_dropout", "norm_eps")
SWITCHES = ("tie_embeddings", "norm_before_gate", "norm_per_group", "conv_bias", "proj_bias", "residual_in_fp32")


def test_every_field_is_checked():
    assert {field.name for field in dataclasses.fields(Mamba2Config)} == {*WHOLE, *REAL, *SWITCHES, "a_init"}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -4, 2.0, "64", None, True, 10**9, float("nan"), [64]], ids=repr)
def test_sizes_are_whole_positive_and_bounded(name, value):
    with pytest.raises(ValueError, match=name):
        Mamba2Config(**{"vocab_size": 100, name: value})


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "0.1", None, True, 10**400], ids=repr)
def test_numbers_are_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=name):
        Mamba2Config(**{"vocab_size": 100, name: value})


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [1, 0, "true", None], ids=repr)
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ValueError, match=name):
        Mamba2Config(**{"vocab_size": 100, name: value})


@pytest.mark.parametrize(
    "values, word",
    [
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_init_floor": 0.2}, "dt_init_floor"),
        ({"dt_init_floor": 0.0}, "dt_init_floor"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"a_init": "HiPPO"}, "hippo"),
        ({"a_init": None}, "hippo"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_or_the_mathematics(values, word):
    with pytest.raises(ValueError, match=word):
        Mamba2Config(vocab_size=100, **values)


def test_a_dictionary_comes_back():
    c = Mamba2Config(vocab_size=100, d_model=32, headdim=16, ngroups=2, a_init="uniform", dropout=0.1)
    assert Mamba2Config.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@pytest.mark.parametrize(
    "key, near", [("d_modle", "d_model"), ("n_layers", "n_layer"), ("head_dim", "headdim"), ("dstate", "d_state")]
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(key, near):
    with pytest.raises(ValueError, match=f"{key}.*{near}"):
        Mamba2Config.from_dict({"vocab_size": 100, key: 8})


def test_unknown_keys_far_from_any_are_refused_too():
    with pytest.raises(ValueError, match="rope_theta"):
        Mamba2Config.from_dict({"vocab_size": 100, "rope_theta": 1e4})
    with pytest.raises(ValueError):
        Mamba2Config.from_dict({"vocab_size": 100, 5: 1})


def test_an_unknown_argument_is_a_value_error():
    with pytest.raises(ValueError, match="d_modle"):
        Mamba2Config(vocab_size=100, d_modle=8)


def test_a_config_needs_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size"):
        Mamba2Config.from_dict({"d_model": 64})


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Mamba2Config(vocab_size=100).d_model = 8
