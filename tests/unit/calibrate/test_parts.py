"""Parts of a text by document, and texts that have fewer windows than would be liked."""

import json

import pytest

from ffnscope.calibrate.pack import Cut
from ffnscope.calibrate.text import TextSource, check_text, load_cut, load_documents, load_windows
from ffnscope.errors import TextError


@pytest.fixture
def rows(tmp_path):
    def write(count, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(count)))
        return str(path)

    return write


class TestParts:
    def test_every_eighth_document(self, rows):
        name = rows(20)
        whole, fit, held = (list(load_documents(TextSource(name, part=part))) for part in (None, "fit", "held_out"))
        assert held == [whole[7], whole[15]] and fit == [one for one in whole if one not in held]

    def test_a_folder_of_files(self, tmp_path):
        for i in range(9):
            (tmp_path / f"{i}.txt").write_text(str(i))
        assert list(load_documents(TextSource(str(tmp_path), part="held_out"))) == ["7"]

    @pytest.mark.parametrize("part", ["fit", "held_out"])
    def test_too_few_documents(self, rows, part):
        with pytest.raises(TextError, match=r"has 7 document\(s\), and every 8th is held out: at least 8 are needed"):
            list(load_documents(TextSource(rows(7), part=part)))

    def test_found_at_once(self, rows):
        check_text(TextSource(rows(8), part="held_out"))
        with pytest.raises(TextError, match="at least 8 are needed"):
            check_text(TextSource(rows(7), part="held_out"))

    def test_the_words_tell_it(self, rows):
        assert TextSource(rows(8), part="fit").describe().endswith("split train, all but every 8th document")


class TestFewer:
    def test_all_that_there_are(self, rows, tokenizer):
        source = TextSource(rows(8))
        whole = load_windows(source, tokenizer, n=None, length=16)
        found = load_cut(source, tokenizer, Cut(len(whole) + 5, 16, least=1))
        assert found.hash == whole.hash
        assert load_windows(source, tokenizer, n=len(whole), length=16).hash == whole.hash

    def test_no_fewer_than_the_least(self, rows, tokenizer):
        with pytest.raises(TextError, match="1,000 windows of 16 tokens were asked"):
            load_cut(TextSource(rows(8)), tokenizer, Cut(2000, 16, least=1000))

    def test_a_mixture_stays_equal(self, rows, tokenizer):
        short, long = (TextSource(rows(n, f"{n}.jsonl")) for n in (2, 30))
        alone = len(load_windows(short, tokenizer, n=None, length=16))
        source = TextSource(short.name, mix=(long,))
        found = load_cut(source, tokenizer, Cut(10 * alone, 16, least=2))
        assert len(found) == 2 * alone
        assert found.hash == load_windows(source, tokenizer, n=2 * alone, length=16).hash
