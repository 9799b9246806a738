from __future__ import annotations

import pickle

import pytest

from ffnscope import errors


def test_every_error_is_an_ffnscope_error_and_what_a_caller_would_expect() -> None:
    assert issubclass(errors.UsageError, errors.FFNScopeError)
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.LayoutError, errors.ModelError)
    assert issubclass(errors.ArtifactError, OSError)
    assert issubclass(errors.NonFiniteError, ArithmeticError)
    assert issubclass(errors.DeviceError, RuntimeError)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("wandas", "Unknown metric 'wandas'. Did you mean 'wanda'? Known: random, wanda."),
        ("zzz", "Unknown metric 'zzz'. Known: random, wanda."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(asked: str, message: str) -> None:
    assert str(errors.unknown_name("metric", asked, ["wanda", "random"])) == message


def test_an_unknown_name_among_none() -> None:
    assert str(errors.unknown_name("text", "a", [])) == "Unknown text 'a'. Known: none."


def test_all_problems_of_a_file_are_one_error() -> None:
    error = errors.ConfigError("a.yaml", ["first", "second"])
    assert str(error) == "a.yaml: 2 problems\n  - first\n  - second"
    assert error.problems == ["first", "second"]
    assert str(errors.ConfigError("a.yaml", ["only"])).startswith("a.yaml: 1 problem\n")


@pytest.mark.parametrize("error", [errors.ConfigError("a", ["b", "c"]), errors.SweepError({"cell": "why"}, 3)])
def test_errors_reach_other_processes_as_they_are(error: errors.FFNScopeError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
