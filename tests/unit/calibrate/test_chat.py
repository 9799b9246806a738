import pytest

from ffnscope.calibrate.text import make_windows
from ffnscope.errors import TextError

SHORT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
LONG = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so ♥"},
    {"role": "user", "content": "then?"},
    {"role": "assistant", "content": "bye"},
]


def targets(tokenizer, windows):
    return [tokenizer.decode(ids[mask]) for ids, mask in zip(windows.input_ids, windows.targets, strict=True)]


def test_the_template_makes_the_tokens(chat_tokenizer):
    windows = make_windows([SHORT, LONG], chat_tokenizer, n=None, length=300)
    for chat, ids, valid in zip((SHORT, LONG), windows.input_ids, windows.valid, strict=True):
        assert chat_tokenizer.decode(ids[valid]) == chat_tokenizer.apply_chat_template(chat, tokenize=False)
    assert windows.n_targets == windows.n_tokens - 2
    assert windows.source == "text: 2 of 2 chats of at most 300 tokens"


@pytest.mark.parametrize("mode", ["contiguous", "lines", "chat"])
def test_chats_choose_their_mode(chat_tokenizer, mode):
    windows = make_windows([SHORT, LONG], chat_tokenizer, n=2, length=300, mode=mode)
    assert windows.document.tolist() == [0, 1] and "chats" in windows.source


def test_answers_only_by_markers_and_by_prefixes_agree(chat_tokenizer, marked_tokenizer):
    found = [
        make_windows([SHORT, LONG], tokenizer, n=None, length=300, answers_only=True)
        for tokenizer in (chat_tokenizer, marked_tokenizer)
    ]
    assert found[0].hash == found[1].hash
    assert targets(chat_tokenizer, found[0]) == ["ho<|im_end|>", "so ♥<|im_end|>bye<|im_end|>"]
    assert found[0].source.endswith("loss on answers only")


def test_answers_beyond_the_length_leave_a_chat_out(chat_tokenizer):
    windows = make_windows([LONG, SHORT], chat_tokenizer, n=None, length=39, answers_only=True)
    assert windows.document.tolist() == [1]
    with pytest.raises(TextError, match="2 windows of 39 tokens were asked of text; it has 1"):
        make_windows([LONG, SHORT], chat_tokenizer, n=2, length=39, answers_only=True)


def test_an_answer_that_opens_the_chat_answers_nothing(chat_tokenizer):
    opened = [{"role": "assistant", "content": "hello"}, *SHORT]
    windows = make_windows([opened], chat_tokenizer, n=None, length=300, answers_only=True)
    assert targets(chat_tokenizer, windows) == ["ho<|im_end|>"]


def test_no_template(tokenizer):
    with pytest.raises(TextError, match="chats need a tokenizer with a chat template; this one has none"):
        make_windows([SHORT], tokenizer, n=1, length=100)


def test_a_template_that_rewrites_earlier_turns(rewriting_tokenizer):
    windows = make_windows([SHORT], rewriting_tokenizer, n=1, length=300, answers_only=True)
    assert targets(rewriting_tokenizer, windows) == ["ho<|im_end|>"]
    with pytest.raises(TextError, match="chat 1: the chat template renders message 2 differently when more messages"):
        make_windows([SHORT, LONG], rewriting_tokenizer, n=1, length=300, answers_only=True)


def test_a_template_that_refuses(chat_tokenizer):
    template = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(TextError, match=r"chat 0 \(roles user, assistant\) is refused.*roles must alternate"):
            make_windows([SHORT], chat_tokenizer, n=1, length=100)
    finally:
        chat_tokenizer.chat_template = template
