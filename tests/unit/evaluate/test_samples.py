from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ffnscope.apply.mask import masked
from ffnscope.errors import UsageError
from ffnscope.evaluate.samples import generate_samples

PROMPTS = ["w10 w11 w12 w13", "w20", "w30 w31"]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **special)


@pytest.fixture
def with_pad():
    return make_tokenizer(pad_token="<s>")


@pytest.fixture
def without_pad():
    return make_tokenizer()


@contextlib.contextmanager
def logged():
    """Collect what transformers logs, which does not reach the root logger."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def slow_greedy(model, tokenizer, prompt, n):
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["with_pad", "without_pad"])
def test_samples_equal_a_slow_greedy_loop(model, name, request):
    tokenizer = request.getfixturevalue(name)
    found = generate_samples(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert found == [slow_greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert all(found)


def test_the_models_own_sampling_settings_are_set_aside_silently(model, with_pad):
    plain = generate_samples(model, with_pad, PROMPTS, max_new_tokens=8)
    own = model.generation_config
    own.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=5, repetition_penalty=9.0, max_length=5)
    with logged() as records:
        found = generate_samples(model, with_pad, PROMPTS, max_new_tokens=8)
    assert [r.getMessage() for r in records] == []
    assert found == plain
    assert model.generation_config is own
    assert (own.temperature, own.max_length) == (0.6, 5)


def test_the_models_end_tokens_end_a_sample(model, with_pad):
    first = slow_greedy(model, with_pad, PROMPTS[0], 3).split()
    model.generation_config.eos_token_id = [2, with_pad.convert_tokens_to_ids(first[1])]
    found = generate_samples(model, with_pad, PROMPTS, max_new_tokens=8)
    assert found[0].split() == first[:2]


def test_everything_is_left_as_it_was(model, with_pad):
    model.train()
    assert with_pad.padding_side == "right"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generate_samples(model, with_pad, PROMPTS, max_new_tokens=2)
    assert with_pad.padding_side == "right"
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_settings_come_back_after_an_error(model, with_pad):
    def fail(*_):
        raise KeyboardInterrupt

    own = model.generation_config
    model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate_samples(model, with_pad, PROMPTS, max_new_tokens=2)
    assert model.generation_config is own


def test_pruned_samples_differ_from_dense_ones(model, with_pad, make_plan):
    dense = generate_samples(model, with_pad, PROMPTS, max_new_tokens=8)
    with masked(model, make_plan(0.75)):
        pruned = generate_samples(model, with_pad, PROMPTS, max_new_tokens=8)
    assert pruned != dense
    assert generate_samples(model, with_pad, PROMPTS, max_new_tokens=8) == dense


def test_chat_template_only_when_asked(model, with_pad):
    with pytest.raises(UsageError, match="no chat template; use chat=False or an instruct model"):
        generate_samples(model, with_pad, PROMPTS, max_new_tokens=4, chat=True)
    with_pad.chat_template = "{% for m in messages %}w40 {{ m.content }} w41{% endfor %}"
    found = generate_samples(model, with_pad, PROMPTS, max_new_tokens=4, chat=True)
    wrapped = [f"w40 {prompt} w41" for prompt in PROMPTS]
    assert found == generate_samples(model, with_pad, wrapped, max_new_tokens=4)
    assert found != generate_samples(model, with_pad, PROMPTS, max_new_tokens=4)


def test_refusals(model, with_pad):
    assert generate_samples(model, with_pad, [], max_new_tokens=4) == []
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1; got 0"):
        generate_samples(model, with_pad, PROMPTS, max_new_tokens=0)
    with pytest.raises(UsageError, match=r"prompt 1 \(''\) has no token"):
        generate_samples(model, with_pad, ["w10", ""], max_new_tokens=4)
