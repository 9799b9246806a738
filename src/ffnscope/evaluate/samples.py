"""Generated samples: what the model writes after a prompt, to look at dense and pruned text side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffnscope.calibrate.forward import input_device
from ffnscope.errors import UsageError
from ffnscope.evaluate.forward import evaluating, memory_errors

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    chat: bool = False,
) -> list[str]:
    """Greedy continuations of prompts, without the prompts and without special tokens.

    The model's own generation settings (sampling, penalties, lengths) are set aside, except its end-of-text tokens.
    Prompts run as one left-padded batch, or one by one when the tokenizer has no padding token.

    Args:
        model: a `transformers` causal LM, dense or inside ``masked``; left as it was.
        tokenizer: its tokenizer; left as it was.
        prompts: texts to continue.
        max_new_tokens: longest continuation, in tokens.
        chat: wrap each prompt as a user's turn with the tokenizer's chat template.

    Returns:
        One continuation per prompt.

    Raises:
        UsageError: a prompt has no token, ``max_new_tokens`` < 1, or the tokenizer has no chat template.
        DeviceError: the accelerator is out of memory.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    rows = [_token_ids(tokenizer, prompt, chat) for prompt in prompts]
    for index, row in enumerate(rows):
        if not row:
            raise UsageError(f"prompt {index} ({prompts[index]!r}) has no token; give it at least one word.")
    batches = [rows] if rows and tokenizer.pad_token_id is not None else [[row] for row in rows]
    samples: list[str] = []
    with evaluating(model), _greedy(model, tokenizer, max_new_tokens) as config:
        for batch in batches:
            with memory_errors(len(batch), max(map(len, batch)) + max_new_tokens):
                samples += _continue(model, tokenizer, batch, config)
    return samples


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
    if tokenizer.chat_template is None:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use chat=False or an instruct model."
        )
    turn = [{"role": "user", "content": prompt}]
    text: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


@contextlib.contextmanager
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Generator[GenerationConfig]:
    """Plain greedy settings, also as the model's own: `generate` fills what is unset from those."""
    from transformers import GenerationConfig

    own = model.generation_config
    end: Any = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    pad = first_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad
    )
    model.generation_config = GenerationConfig()
    try:
        yield config
    finally:
        model.generation_config = own


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], config: GenerationConfig
) -> list[str]:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 0 if config.pad_token_id is None else int(config.pad_token_id))
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = 1
    device = input_device(model)
    written: Tensor = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)  # type: ignore[operator]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in written[:, length:]]
