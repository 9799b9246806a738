import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffnscope.calibrate import pack, tokens
from ffnscope.calibrate.pack import choose
from ffnscope.calibrate.text import make_windows
from ffnscope.errors import TextError, UnknownNameError, UsageError

TEXTS = ["abcdefg", "hij\n\n\n", "", "klmnöp"]
STREAM = "abcdefg\n\nhij\n\nklmnöp\n\n".encode()


def decode(tokenizer, ids):
    return tokenizer.decode(ids).encode()


class TestContiguous:
    def test_blocks_are_the_stream_without_padding(self, tokenizer):
        windows = make_windows(TEXTS, tokenizer, n=None, length=4)
        blocks = [STREAM[i : i + 4] for i in range(0, len(STREAM) // 4 * 4, 4)]
        assert [tokenizer.convert_ids_to_tokens(row) for row in windows.input_ids.tolist()] == [
            tokenizer.tokenize(block.decode()) for block in blocks
        ]
        assert bool(windows.valid.all())
        assert bool(windows.targets[:, 1:].all()) and not bool(windows.targets[:, 0].any())
        assert windows.document.tolist() == [0, 0, 0, 1, 3]
        assert windows.source == "text: 5 of 5 contiguous windows of 4 tokens"

    def test_beginning_of_sequence_is_put_first_where_the_tokenizer_adds_it(self, bos_tokenizer, closing_tokenizer):
        for tokenizer in (bos_tokenizer, closing_tokenizer):
            windows = make_windows(TEXTS, tokenizer, n=None, length=4)
            assert windows.input_ids.shape == (len(STREAM) // 3, 4)
            assert bool((windows.input_ids[:, 0] == tokenizer.bos_token_id).all())
            assert not bool((windows.input_ids[:, 1:] == tokenizer.eos_token_id).any())
            assert decode(tokenizer, windows.input_ids[:, 1:].flatten()) == STREAM[: len(STREAM) // 3 * 3]

    def test_choice_depends_on_the_seed_only_and_keeps_the_order(self, tokenizer):
        text = ["".join(map(chr, range(97, 123))) * 4]
        whole = make_windows(text, tokenizer, n=None, length=5)
        seen = set()
        for seed in range(6):
            windows = make_windows(text, tokenizer, n=7, length=5, seed=seed)
            assert windows.hash == make_windows(iter(text), tokenizer, n=7, length=5, seed=seed).hash
            places = [int((whole.input_ids == row).all(1).nonzero()[0]) for row in windows.input_ids]
            assert places == sorted(places)
            seen.add(windows.hash)
        assert len(seen) == 6

    def test_long_streams_are_not_read_to_the_end(self, tokenizer, monkeypatch):
        monkeypatch.setattr(pack, "POOL_TOKENS", 100)
        read = itertools.count()
        endless = (f"{next(read)} some text" for _ in itertools.count())
        windows = make_windows(endless, tokenizer, n=3, length=4)
        assert next(read) < 12
        assert windows.source == "text: 3 of the first 25 contiguous windows of 4 tokens, seed 0"
        assert make_windows(endless, tokenizer, n=50, length=4).source.startswith("text: 50 of the first 200 ")

    def test_a_long_document_is_tokenised_in_pieces(self, tokenizer, monkeypatch):
        text = "one line\nanother line of words\n" + "x" * 30
        whole = make_windows([text], tokenizer, n=None, length=5)
        monkeypatch.setattr(tokens, "PIECE", 12)
        assert make_windows([text], tokenizer, n=None, length=5).hash == whole.hash

    def test_too_short_says_what_there_is(self, tokenizer):
        with pytest.raises(
            TextError, match=r"3 windows of 10 tokens were asked of text; it has 2 \(23 tokens in 4 docum"
        ):
            make_windows(TEXTS, tokenizer, n=3, length=10)
        with pytest.raises(TextError, match=r"1 windows of 100 tokens were asked of text; it has 0 \(23 tokens"):
            make_windows(TEXTS, tokenizer, n=None, length=100)

    @pytest.mark.parametrize("texts", [[""], ["", " \n "]])
    @pytest.mark.parametrize("mode", ["contiguous", "lines"])
    def test_empty_text(self, tokenizer, texts, mode):
        with pytest.raises(TextError, match="text holds no text: every document is empty"):
            make_windows(texts, tokenizer, n=1, length=4, mode=mode)

    def test_no_document(self, tokenizer):
        with pytest.raises(TextError, match="holds no document"):
            make_windows([], tokenizer, n=1, length=4)


class TestLines:
    def test_padding_is_masked_by_position(self, tokenizer):
        end = tokenizer.eos_token
        windows = make_windows(["abc" + end, "", "d", "efghijk", "lm"], tokenizer, n=None, length=5, mode="lines")
        assert windows.document.tolist() == [0, 3, 4]
        assert windows.valid.tolist() == [[True] * 4 + [False], [True] * 5, [True] * 2 + [False] * 3]
        assert windows.targets.tolist() == [
            [False, True, True, True, False],
            [False, True, True, True, True],
            [False, True, False, False, False],
        ]
        assert windows.input_ids[0, 3:].tolist() == [tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert windows.source == "text: 3 of 3 lines of at most 5 tokens"

    def test_special_tokens_of_the_tokenizer_are_kept_and_count(self, closing_tokenizer):
        windows = make_windows(["abc", "d"], closing_tokenizer, n=None, length=9, mode="lines")
        bos, eos = closing_tokenizer.bos_token_id, closing_tokenizer.eos_token_id
        assert windows.input_ids[:, 0].tolist() == [bos, bos]
        assert windows.input_ids[1, 2].item() == eos and bool(windows.targets[1, 2])
        assert windows.valid.sum(1).tolist() == [5, 3]

    def test_choice_and_too_few(self, tokenizer):
        lines = [f"line {i}" for i in range(20)]
        windows = make_windows(lines, tokenizer, n=6, length=9, mode="lines", seed=4)
        assert windows.document.tolist() == choose(20, 6, 4)
        with pytest.raises(TextError, match="21 windows of 9 tokens were asked of text; it has 20"):
            make_windows(lines, tokenizer, n=21, length=9, mode="lines")


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n": 0}, "n must be at least 1 window, or None for all; got 0"),
            ({"length": 1}, "length must be at least 2 tokens.*got 1"),
            ({"mode": "line"}, "Unknown mode of windows 'line'. Did you mean 'lines'"),
            ({"mode": "chat"}, "text holds texts; mode 'chat' needs chats"),
            ({"answers_only": True}, "text holds texts; answers_only needs chats"),
        ],
    )
    def test_bad_values(self, tokenizer, options, message):
        with pytest.raises(UsageError, match=message):
            make_windows(TEXTS, tokenizer, **({"n": 1, "length": 4} | options))

    def test_bad_mode_is_an_unknown_name(self, tokenizer):
        with pytest.raises(UnknownNameError):
            make_windows(TEXTS, tokenizer, n=1, length=4, mode="contigous")

    def test_texts_and_chats_do_not_mix(self, tokenizer, chat_tokenizer):
        chat = [{"role": "user", "content": "hi"}]
        with pytest.raises(TextError, match=r"mixes texts and chats \(document 2\)"):
            make_windows(["a", "b", chat], tokenizer, n=1, length=4)
        with pytest.raises(TextError, match=r"mixes texts and chats \(document 1\)"):
            make_windows([chat, "b"], chat_tokenizer, n=1, length=4)


@given(total=st.integers(1, 300), seed=st.integers(-5, 2**40), share=st.floats(0, 1))
def test_choice_is_a_sorted_sample_and_grows(total, seed, share):
    n = max(1, int(total * share))
    chosen = choose(total, n, seed)
    assert chosen == sorted(set(chosen)) and len(chosen) == n
    assert chosen[0] >= 0 and chosen[-1] < total
    assert set(chosen) <= set(choose(total, min(total, n + 5), seed))


def test_choice_is_uniform():
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[choose(20, 5, seed)] += 1
    assert bool((counts / 2000 - 0.25).abs().max() < 0.04)
    assert choose(10, 4, 0) == [4, 5, 6, 9]


@given(text=st.text(alphabet="ab \n", max_size=80))
def test_pieces_are_the_text(text):
    before, tokens.PIECE = tokens.PIECE, 7
    try:
        found = list(tokens.pieces(text))
    finally:
        tokens.PIECE = before
    assert "".join(found) == text
    assert all(0 < len(piece) <= 7 for piece in found[:-1])
