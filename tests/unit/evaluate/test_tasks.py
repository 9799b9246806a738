from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import small_tokenizer
from ffnscope.apply.mask import masked
from ffnscope.errors import ArtifactError, NonFiniteError, NotAvailableError, TextError, UsageError
from ffnscope.evaluate.task_tokens import TaskTokens, task_tokens
from ffnscope.evaluate.tasks import TaskOptions, compare_tasks, load_tasks
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, PruningPlan
from tiny import tiny

QUESTIONS = [
    {"query": "The people of the", "choices": ["United States", "Senate and House", "war"], "answer": 0},
    {"query": "It is my duty to", "choices": ["inform you", "go"], "answer": 1},
    {"query": "The year has been", "choices": ["good", "a year of peace"], "answer": 1},
    {"query": "Our laws are", "choices": ["just", "old", "many"], "answer": 2},
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what lm-eval imports


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=64)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def half(model: Any) -> PruningPlan:
    sites = find_sites(model)
    return PruningPlan({s: torch.arange(s.d_ff // 2) for s in sites}, "first", "local", Budget(0.5))


def log_likelihood(model: Any, tokenizer: Any, query: str, choice: str) -> float:
    """Sum of log p of a choice's tokens after a query, one row at a time."""
    whole = tokenizer(f"{query} {choice}", return_tensors="pt")["input_ids"]
    n = whole.shape[1] - len(tokenizer(query)["input_ids"])
    with torch.inference_mode():
        log_p = model(input_ids=whole).logits.log_softmax(-1)[0, :-1]
    return float(log_p.gather(1, whole[0, 1:, None])[-n:].sum())


def slow_acc(model: Any, tokenizer: Any) -> tuple[float, float]:
    """Accuracy by log-likelihood, and by log-likelihood per character."""
    plain, normed = [], []
    for row in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, row["query"], c) for c in row["choices"]]
        per_character = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        plain.append(max(range(len(scores)), key=scores.__getitem__) == row["answer"])
        normed.append(max(range(len(scores)), key=per_character.__getitem__) == row["answer"])
    return sum(plain) / len(plain), sum(normed) / len(normed)


def test_tokens_of_tasks(tokenizer, questions):
    def size(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    each = [size(row["query"]) + size(f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    found = task_tokens(load_tasks(TaskOptions((str(questions),))), tokenizer)
    assert found == TaskTokens(len(each), sum(each), 0, max(each))
    assert task_tokens(load_tasks(TaskOptions((str(questions),), limit=1)), tokenizer).read == sum(each[:3])


def test_tokens_beyond_the_questions_that_are_counted(tokenizer, questions, monkeypatch):
    questions.write_text("\n".join([json.dumps(QUESTIONS[0])] * 10))
    monkeypatch.setattr("ffnscope.evaluate.task_tokens.QUESTIONS", 2)
    few = load_tasks(TaskOptions((str(questions),), limit=2))
    assert (
        task_tokens(load_tasks(TaskOptions((str(questions),))), tokenizer).read == 5 * task_tokens(few, tokenizer).read
    )


def test_dense_and_pruned_side_by_side(model, tokenizer, questions):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tasks = load_tasks(TaskOptions((str(questions),), batch_size=2))
    assert tasks.n_questions == {str(questions): 4}
    state = random.getstate(), torch.random.get_rng_state()
    rows = compare_tasks(model, tokenizer, {"half": half(model)}, tasks)
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = {(r.label, r.result.name): r for r in rows}
    assert [*found] == [(label, name) for label in ("dense", "half") for name in ("acc", "acc_norm")]
    for label in ("dense", "half"):
        with masked(model, half(model)) if label == "half" else torch.no_grad():
            expected = slow_acc(model, tokenizer)
        assert (found[label, "acc"].result.value, found[label, "acc_norm"].result.value) == expected
    one = found["dense", "acc"]
    p = one.result.value
    assert one.result.stderr == pytest.approx(math.sqrt(p * (1 - p) / 3))  # as lm-eval: of a sample
    assert (one.result.n, one.num_fewshot, one.higher_is_better) == (4, 0, True)
    assert one.as_dict()["task"] == "questions"


def test_limit_and_examples(model, tokenizer, questions):
    tasks = load_tasks(TaskOptions((str(questions),), num_fewshot=2, limit=3))
    assert tasks.n_questions == {str(questions): 3}
    rows = compare_tasks(model, tokenizer, {}, tasks)
    assert {(r.result.n, r.num_fewshot) for r in rows} == {(3, 2)}
    again = compare_tasks(model, tokenizer, {"same": _nothing(model)}, tasks)
    assert [r.result.value for r in again[:2]] == [r.result.value for r in again[2:]]  # the same examples for both


def _nothing(model: Any) -> PruningPlan:
    return PruningPlan({s: torch.arange(s.d_ff) for s in find_sites(model)}, "none", "local", Budget(0.0))


def test_a_second_call_runs_only_what_is_missing(model, tokenizer, questions, tmp_path):
    tasks = load_tasks(TaskOptions((str(questions),)))
    state = tmp_path / "tasks.json"
    first = compare_tasks(model, tokenizer, {}, tasks, state=state)
    calls: list[tuple[int, int]] = []
    given: Any = {"state": state, "on_requests": lambda *c: calls.append(c)}
    both = compare_tasks(model, tokenizer, {"half": half(model)}, tasks, **given)
    assert both[:2] == first and calls[-1] == (10, 10) and [c[0] for c in calls] == sorted(c[0] for c in calls)
    calls.clear()
    compare_tasks(model, tokenizer, {"half": half(model)}, tasks, **given)
    assert not calls
    limited = load_tasks(TaskOptions((str(questions),), limit=2))
    assert {r.result.n for r in compare_tasks(model, tokenizer, {}, limited, state=state)} == {2}  # other tasks: anew
    state.write_text("{")
    with pytest.raises(ArtifactError, match="every task is run anew"):
        compare_tasks(model, tokenizer, {}, tasks, state=state)


def test_a_changed_file_is_another_task(questions):
    first = load_tasks(TaskOptions((str(questions),))).key
    questions.write_text(json.dumps(QUESTIONS[0]))
    assert load_tasks(TaskOptions((str(questions),))).key != first


def test_texts_and_targets(model, tokenizer, questions, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The people of the United States."}))
    (tmp_path / "targets.json").write_text(json.dumps([{"query": "The people of the", "target": " United States"}]))
    names = tuple(str(tmp_path / n) for n in ("texts.jsonl", "targets.json"))
    found = {r.result.name: r for r in compare_tasks(model, tokenizer, {}, load_tasks(TaskOptions(names)))}
    assert set(found) == {"word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", "acc"}
    nll = -log_likelihood(model, tokenizer, "The people of the", "United States")
    assert found["perplexity"].result.value == pytest.approx(math.exp(nll), rel=1e-4)
    byte = found["byte_perplexity"].result.value
    assert found["bits_per_byte"].result.value == pytest.approx(math.log2(byte))
    assert found["bits_per_byte"].higher_is_better is False


def test_numbers_that_are_not_finite_are_an_error(tokenizer, tmp_path, questions):
    broken = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=64)
    with torch.no_grad():
        broken.lm_head.weight[:] = math.nan
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The people of the United States."}))
    with pytest.raises(NonFiniteError, match="dense: word_perplexity of task texts is nan"):
        compare_tasks(broken, tokenizer, {}, load_tasks(TaskOptions((str(tmp_path / "texts.jsonl"),))))


def test_an_unknown_task_is_told_with_its_name():
    with pytest.raises(TextError, match=r"lm-eval has no task 'hellaswagg'\. Did you mean 'hellaswag'\?"):
        load_tasks(TaskOptions(("hellaswagg",)))


def test_two_files_of_one_name_do_not_hide_each_other(questions, tmp_path):
    other = tmp_path / "more" / questions.name
    other.parent.mkdir()
    other.write_text(questions.read_text())
    with pytest.raises(UsageError, match=r"are both called 'questions'; rename the file"):
        load_tasks(TaskOptions((str(questions), str(other))))


def test_a_task_whose_data_are_missing_is_told_with_its_name(tmp_path):
    missing = tmp_path / "broken.yaml"
    missing.write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/at/all.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: x\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    with pytest.raises(TextError, match=r"task '.*broken.yaml' cannot be loaded: Unable to find .*/nowhere"):
        load_tasks(TaskOptions((str(missing),)))


def test_a_task_without_examples_does_not_ignore_them_silently(questions, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nnum_fewshot: 0\n"
    )
    assert load_tasks(TaskOptions((str(own),))).n_questions == {str(own): 4}
    with pytest.raises(UsageError, match="'own' is defined without examples, and 3 were asked for"):
        load_tasks(TaskOptions((str(own),), num_fewshot=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": ()}, "got none"),
        ({"names": ("piqa", "piqa")}, "distinct names; got piqa, piqa"),
        ({"names": ("piqa",), "limit": 0}, "limit of tasks must be at least 1; got 0"),
        ({"names": ("piqa",), "num_fewshot": -1}, "num_fewshot of tasks must be at least 0; got -1"),
        ({"names": ("piqa",), "batch_size": 0}, "batch_size of tasks must be at least 1; got 0"),
    ],
)
def test_options_out_of_range(given, message):
    with pytest.raises(UsageError, match=message):
        TaskOptions(**given)


def test_a_plan_cannot_be_called_dense(model, tokenizer, questions):
    with pytest.raises(UsageError, match="cannot be called 'dense'"):
        compare_tasks(model, tokenizer, {"dense": half(model)}, load_tasks(TaskOptions((str(questions),))))


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NotAvailableError, match=r"pip install 'ffnscope\[eval\]'"):
        load_tasks(TaskOptions(("piqa",)))
