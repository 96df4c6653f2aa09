"""Settings, their checks, and the flags that are made from them."""

import argparse
import dataclasses
import importlib
import math
import os

import pytest
import torch

from mamba2_min import devices, flags, validate
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.flags import HelpFormatter, add_flags, asked_for, flag
from mamba2_min.settings import MODEL_FLAGS, PRESETS, DataSettings, Settings, setting

# Plain values


@pytest.mark.parametrize("value", [1, 7, 2**31 - 1])
def test_good_integers_come_back(value):
    assert validate.integer("context", value, 1, 2**31 - 1) == value


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, True, "x", None, [], math.nan])
def test_everything_else_is_one_line(value):
    with pytest.raises(ValueError, match=r"^context must be an integer from 1 to 2\^31 - 1, not .{1,40}$"):
        validate.integer("context", value, 1, 2**31 - 1)


def test_an_integer_that_cannot_be_printed_is_refused_like_any_other():
    with pytest.raises(ValueError, match=r"^context must be an integer from 1 to 9, not one of that size$"):
        validate.integer("context", 10**5000, 1, 9)


def test_the_messages_name_what_is_allowed():
    def message(check, *arguments):
        with pytest.raises(ValueError) as error:
            check(*arguments)
        return str(error.value)

    assert message(validate.integer, "context", "x", 1, 100) == "context must be an integer from 1 to 100, not 'x'"
    assert message(validate.integer, "seed", -1, 0, 2**63 - 1) == "seed must be an integer from 0 to 2^63 - 1, not -1"
    assert message(validate.integer, "size", 0, 1, 1 << 24) == "size must be an integer from 1 to 2^24, not 0"
    assert message(validate.number, "top_p", 2, 0, 1) == "top_p must be a number from 0 to 1, not 2"
    assert message(validate.number, "lr", math.nan, 0, math.inf) == "lr must be a number of at least 0, not nan"
    assert message(validate.number, "x", "1", -math.inf, 3) == "x must be a number of at most 3, not '1'"
    assert message(validate.number, "x", math.inf, -math.inf, math.inf) == "x must be a finite number, not inf"
    assert message(validate.boolean, "compile", 1) == "compile must be true or false, not 1"
    assert message(validate.one_of, "a", "z", ("x", "y")) == "a must be one of x, y, not 'z'"
    assert message(validate.one_of, "a", ["x"], ("x", "y")) == "a must be one of x, y, not ['x']"
    assert len(message(validate.one_of, "a", "z" * 1000, ("x",))) < 80


@pytest.mark.parametrize("value", [0, 0.5, 1, 1e-300])
def test_good_numbers_come_back(value):
    assert validate.number("share", value, 0, 1) is value


@pytest.mark.parametrize("value", [True, 10**400, -(10**400), "0.5", None, 1.0000001, math.inf])
def test_numbers_that_are_none(value):
    with pytest.raises(ValueError, match=r"^share must be a number from 0 to 1, not "):
        validate.number("share", value, 0, 1)


def test_booleans_and_choices_come_back():
    assert validate.boolean("on", False) is False
    assert validate.one_of("form", "b", ("a", "b")) == "b"


# Settings


@pytest.mark.parametrize("cls", [Settings, DataSettings])
def test_every_default_is_allowed_and_its_type_is_checked(cls):
    cls()
    for field in dataclasses.fields(cls):
        with pytest.raises(ValueError, match=rf"^{field.name} must be "):
            cls(**{field.name: object()})


@pytest.mark.parametrize(
    "values",
    [
        {"data": None},
        {"data": 7},
        {"val_data": 7},
        {"vocab_size": 0},
        {"vocab_size": "many"},
        {"min_count": 0},
        {"min_count": None},
        {"val_fraction": 1.5},
        {"val_fraction": "x"},
        {"pattern": "letters"},
    ],
)
def test_impossible_data_settings_are_value_errors(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        DataSettings(**values)


def test_no_vocabulary_limit_and_no_validation_documents_are_possible():
    assert DataSettings(vocab_size=None).val_data is None


# Flags


@dataclasses.dataclass
class Example:
    steps: int = setting(5, "how many", low=1)
    size: int | None = setting(None, "how large", shown="all", auto="adapt")
    rate: float = setting(1e-5, "how fast")
    fast: bool = setting(False, "hurry")
    form: str = setting("a", "which one", choices=("a", "b"))
    path: str = setting("there", "where", metavar="DIR")
    adapt: bool = setting(False)


def parser():
    it = argparse.ArgumentParser()
    add_flags(it.add_argument_group("all"), dataclasses.fields(Example))
    return it


def test_a_flag_for_each_field_with_a_help_text_and_its_default():
    said = " ".join(parser().format_help().split())
    for text in (
        "--steps N how many (5)",
        "--size N how large (all)",
        "--rate X how fast (1e-05)",
        "--fast, --no-fast hurry (off)",
        "--form {a,b} which one (a)",
        "--path DIR where (there)",
    ):
        assert text in said
    assert "--adapt" not in said


def test_only_what_was_given_is_asked_for():
    def asked(*arguments):
        return asked_for(parser().parse_args(arguments), Example)

    assert asked() == {}
    assert asked("--steps", "3", "--rate", "2", "--no-fast", "--form", "b", "--path", "x") == {
        "steps": 3,
        "rate": 2.0,
        "fast": False,
        "form": "b",
        "path": "x",
    }
    assert asked("--size", "auto") == {"adapt": True}
    assert asked("--size", "8", "--fast") == {"size": 8, "fast": True}
    for wrong in (["--steps", "x"], ["--steps", "auto"], ["--size", "most"], ["--form", "c"], ["--adapt"]):
        with pytest.raises(SystemExit):
            asked(*wrong)


def test_every_flag_of_the_model_is_a_field_of_its_config():
    names = {field.name for field in dataclasses.fields(Mamba2Config)}
    assert names >= set(MODEL_FLAGS)
    assert all(names >= preset.keys() for preset in PRESETS.values())
    assert flag("a_init") == "--a-init"


EVALUATIONS = [f"evaluation.{name}" for name in ("compare", "needle", "position", "referee")]


@pytest.mark.parametrize("command", ["merge", "export", *EVALUATIONS])
def test_an_empty_name_is_no_folder_to_write_into(command, capsys):
    """As of a variable of the shell that is not set: it would be the folder where one happens to be."""
    parser = importlib.import_module(f"mamba2_min.{command}").build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", ""])
    assert "argument --out: the name of a folder is wanted, and it is empty" in capsys.readouterr().err


def test_integers_of_flags_are_bounded():
    for args in ({"a": 1, "b": None}, {"a": 2**31 - 1, "b": 0}):
        flags.check_integers(argparse.Namespace(**args), a=1, b=0)
    for value in (0, -(10**400), 10**400, 2**31):
        with pytest.raises(UserError, match="--max-tokens must be at least 1 and at most 2,147,483,647"):
            flags.check_integers(argparse.Namespace(max_tokens=value), max_tokens=1)


@pytest.mark.parametrize("wanted", ["", "0", "-1", "x", "9" * 11, "9" * 5000])
def test_an_odd_number_of_threads_in_the_environment_counts_for_nothing(monkeypatch, wanted):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    own = devices.cpu_threads()
    assert 1 <= own <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", str(own + 1))
    assert devices.cpu_threads() == own + 1 == devices.cpu_threads(torch.device("cuda"))


def test_beside_a_gpu_one_thread_is_enough(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert devices.cpu_threads(torch.device("cuda")) == 1
    assert devices.cpu_threads(torch.device("cpu")) == devices.cpu_threads()


def test_a_description_fills_the_terminal_and_its_examples_stay_as_they_are(monkeypatch):
    description = """It does one thing.

    python -m program --data my_documents --out runs/mine    # longer than the lines
python program.py

A paragraph of long lines, such as a source has them, is
filled anew, with well-known words whole.
"""
    monkeypatch.setenv("COLUMNS", "42")
    parser = argparse.ArgumentParser(prog="p", description=description, formatter_class=HelpFormatter, add_help=False)
    assert parser.format_help().splitlines()[2:] == [
        "It does one thing.",
        "",
        "    python -m program --data my_documents --out runs/mine    # longer than the lines",
        "python program.py",
        "",
        "A paragraph of long lines, such as a",
        "source has them, is filled anew, with",
        "well-known words whole.",
    ]
