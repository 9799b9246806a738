"""The evaluation block of a configuration, and further texts, which it and the calibration name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from ffnscope.run.fields import Block, Count, Distinct, Length, NotEmpty, Text
from ffnscope.run.texts import TextSource

PROMPTS = ("The president of the United States", "The most important thing about science is", "Once upon a time")


class ExtraText(TextSource):
    """A further text, to calibrate on in a mixture, or held out."""


class Samples(Block):
    """Texts that the dense and the pruned models continue, to be read side by side."""

    enabled: StrictBool | None = None
    """Generate samples; null: unless the model is streamed, which reads all weights for every token."""
    prompts: Annotated[tuple[Text, ...], NotEmpty] = PROMPTS
    """Beginnings of the texts."""
    max_new_tokens: Count = 40
    """Tokens generated after each prompt."""


class Tasks(Block):
    """Downstream tasks of the dense and the pruned models, run by lm-eval (`pip install 'ffnscope[eval]'`)."""

    names: Annotated[tuple[Text, ...], Distinct] = ()
    """Tasks, groups or tags of lm-eval, or paths of its .yaml files or of own .json and .jsonl files."""
    num_fewshot: Annotated[StrictInt, Field(ge=0)] | None = None
    """Examples before each question; null: what the task says, otherwise none."""
    limit: Count | None = None
    """Questions per task, the first ones; null: all."""
    batch_size: Count = 1
    """Requests per forward pass."""


class Evaluation(Block):
    """Held-out text and what is measured on it."""

    enabled: StrictBool = True
    """Evaluate the dense and every pruned model."""
    name: Text | None = None
    """Held-out text; null: dataset.name."""
    subset: Text | None = None
    """Configuration of a hub dataset; null: dataset.subset when the dataset is the same."""
    split: Text | None = None
    """Part of the text; null: the held-out split of a known dataset (test, for c4 validation)."""
    streaming: StrictBool | None = None
    """Read row by row; null: dataset.streaming when the dataset is the same."""
    text_field: Text | None = None
    """Column that holds the text; null: dataset.text_field when the dataset is the same."""
    revision: Text | None = None
    """Commit, tag or branch of a hub dataset; null: dataset.revision when the dataset is the same."""
    num_samples: Count = 64
    """Token windows of each held-out text; a text that has fewer is an error."""
    max_length: Length | None = None
    """Tokens per window; null: calibration.max_length if that is given, else 512."""
    extra: tuple[ExtraText, ...] = ()
    """Further held-out texts."""
    samples: Samples = Field(default_factory=Samples)
    """Generated samples."""
    tasks: Tasks = Field(default_factory=Tasks)
    """Downstream tasks."""
