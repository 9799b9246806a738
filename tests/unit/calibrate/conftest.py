"""A byte-level tokenizer, so that every token is one byte, with chat templates."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, adds_bos: bool = False, adds_eos: bool = False, template: str | None = None):
    """One token per byte; ``<|im_end|>`` is end of sequence and padding at once, as in SmolLM2."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    single = " ".join(["<|im_start|>"] * adds_bos + ["$A"] + ["<|im_end|>"] * adds_eos)
    ids = [(name, core.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=64,
    )
    found.chat_template = template
    return found


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return byte_tokenizer(adds_bos=True)


@pytest.fixture(scope="session")
def closing_tokenizer():
    return byte_tokenizer(adds_bos=True, adds_eos=True)


@pytest.fixture(scope="session")
def chat_tokenizer():
    return byte_tokenizer(template=CHATML)


@pytest.fixture(scope="session")
def marked_tokenizer():
    return byte_tokenizer(template=MARKED)


@pytest.fixture(scope="session")
def rewriting_tokenizer():
    """Its template drops the answers of earlier turns, as those that strip reasoning do."""
    last_only = "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}"
    return byte_tokenizer(template=CHATML.replace("{{ m.content }}", last_only))
