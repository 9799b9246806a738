"""Groups of options: one dataclass, several commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import click
import pytest
import typer
from typer.testing import CliRunner

from ffnscope.cli import app as cli
from ffnscope.cli.groups import grouped, option_names


@dataclass(frozen=True, slots=True)
class Place:
    """Where."""

    street: Annotated[str, typer.Option(help="A street.")]
    number: Annotated[int, typer.Option("--no", min=1, help="A number.")] = 7


@pytest.fixture
def program() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @grouped
    def visit(*, who: Annotated[str, typer.Argument()], place: Place, loud: bool = False) -> None:
        """Go there."""
        print(who, place, loud)

    return app


def test_fields_are_options_and_come_back_as_the_dataclass(program: typer.Typer) -> None:
    result = CliRunner().invoke(program, ["ann", "--street", "elm", "--loud"])
    assert result.output == f"ann {Place('elm')} True\n"
    result = CliRunner().invoke(program, ["--no", "3", "--street", "elm", "ann"])
    assert result.output == f"ann {Place('elm', 3)} False\n"


def test_help_and_bounds_are_those_of_the_fields(program: typer.Typer) -> None:
    shown = CliRunner().invoke(program, ["--help"]).output
    assert "Go there." in shown and "A street." in shown and "[default: 7]" in shown
    assert CliRunner().invoke(program, ["ann", "--street", "elm", "--no", "0"]).exit_code == 2
    assert CliRunner().invoke(program, ["ann"]).exit_code == 2  # --street is required


def test_names_in_order() -> None:
    assert option_names(Place, Place) == ("street", "number") * 2


def test_no_help_has_words_in_brackets_which_rich_reads_as_markup() -> None:
    todo: list[click.Command] = [typer.main.get_command(cli)]
    helps: list[str] = []
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        helps += [command.help or "", *(getattr(param, "help", None) or "" for param in command.params)]
    assert len(helps) > 200
    assert [text for text in helps if re.search(r"\[/?[a-z]", text)] == []
