"""Every error that a user can meet. Messages say what was asked, what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FFNScopeError(Exception):
    """Root of the tree: ``except FFNScopeError`` catches every error that ffnscope raises on purpose."""


class UsageError(FFNScopeError, ValueError):
    """An argument has a value that cannot be used."""


class UnknownNameError(UsageError):
    """A name is not registered (metric, allocator, statistic, shipped text, ...)."""


class ConfigError(UsageError):
    """One YAML file has one or more problems; ``problems`` lists them all, each with its place."""

    def __init__(self, source: str, problems: list[str]):
        self.source = source
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{source}: {len(problems)} {noun}\n" + "\n".join(f"  - {p}" for p in problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, list[str]]]:
        """How it reaches another process."""
        return type(self), (self.source, self.problems)


class SweepError(FFNScopeError, RuntimeError):
    """Cells of a sweep failed; ``failed`` maps the name of each to what stopped it. The others are finished."""

    def __init__(self, failed: dict[str, str], n_cells: int):
        self.failed, self.n_cells = failed, n_cells
        lines = "\n".join(f"  - {name}: {why}" for name, why in failed.items())
        cure = "The others are finished. Called again, the sweep tries only these."
        super().__init__(f"{len(failed)} of {n_cells} cells failed. {cure}\n{lines}")

    def __reduce__(self) -> tuple[type[SweepError], tuple[dict[str, str], int]]:
        """How it reaches another process."""
        return type(self), (self.failed, self.n_cells)


class NotAvailableError(UsageError):
    """A documented feature that this version does not bring yet."""


class TextError(UsageError):
    """A text cannot be found, read, or is too short for what was asked."""


class ModelError(UsageError):
    """A model cannot be loaded, or is of a kind that ffnscope refuses (quantised, adapter-wrapped, ...)."""


class LayoutError(ModelError):
    """No FFN, or one whose channels cannot be addressed, was found in a model."""


class NonFiniteError(FFNScopeError, ArithmeticError):
    """An activation, a gradient, a score or an evaluation is NaN or infinite."""


class DeviceError(FFNScopeError, RuntimeError):
    """A device is missing or out of memory."""


class ArtifactError(FFNScopeError, OSError):
    """A result file is missing, damaged, of another schema, or would be overwritten."""


class ContractError(FFNScopeError, AssertionError):
    """A metric or allocator breaks a law of its kind (see `ffnscope.testing`)."""


def unknown_name(kind: str, asked: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that is not known, with the nearest known one as a suggestion."""
    names = sorted(known)
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {asked!r}.{hint} Known: {', '.join(names) or 'none'}.")
