"""Reading YAML: places, aliases, overrides, and every fault with its exact words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnscope.errors import ConfigError
from ffnscope.run.choices import model_source
from ffnscope.run.document import parse_document
from ffnscope.run.load import config_from_dict, dump_config, load_config

EXAMPLES = Path(__file__).parents[3] / "examples"
MODEL = "model:\n  model_id: m\n"


@pytest.fixture
def load(tmp_path):
    def read(text: str | bytes, *overrides: str):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return read


@pytest.fixture
def problems(load):
    def read(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return read


# --- one fault, one sentence: (YAML after the two lines of MODEL, problem) ---

FAULTS = [
    ("prunning: {}", "line 3: prunning: unknown key 'prunning'. Did you mean 'pruning'?"),
    (
        "supernode:\n  core_fractoin: 0.1",
        "line 4: supernode.core_fractoin: unknown key 'core_fractoin'. Did you mean 'core_fraction'?",
    ),
    (
        "dataset: {max_length: 4}",
        "line 3: dataset.max_length: unknown key 'max_length'. Did you mean 'calibration.max_length'?",
    ),
    (
        "output: {zzz: 1}",
        "output.zzz: unknown key 'zzz'. Known here: checkpoints, dir, format, max_shard_size, pad_to_widest, plots, "
        "report.",
    ),
    ("metrics: {scra: {}}", "line 3: metrics.scra: unknown key 'scra'. Did you mean 'scar'?"),
    ("metrics: {wnada: {}}", "line 3: metrics.wnada: unknown key 'wnada'. Did you mean 'wanda'?"),
    ("experiment: [1]", "line 3: experiment: expected a mapping of keys to values; got a list."),
    (
        "evaluation:\n  extra:\n    - name: c4\n      splt: x",
        "line 6: evaluation.extra[0].splt: unknown key 'splt'. Did you mean 'split'?",
    ),
    ("evaluation:\n  extra:\n    - split: x", "line 5: evaluation.extra[0].name: this key is required."),
    # types are strict
    ("calibration: {num_samples: '8'}", "line 3: calibration.num_samples: expected a whole number; got '8'."),
    ("calibration: {num_samples: 8.0}", "line 3: calibration.num_samples: expected a whole number; got 8.0."),
    ("calibration: {num_samples: true}", "line 3: calibration.num_samples: expected a whole number; got true."),
    ("calibration: {batch_size: }", "line 3: calibration.batch_size: expected a whole number; got nothing (null)."),
    ("calibration: {num_samples: 0}", "line 3: calibration.num_samples: must be at least 1; got 0."),
    ("calibration: {max_length: 1}", "line 3: calibration.max_length: must be at least 2; got 1."),
    ("experiment: {seed: 4294967296}", "line 3: experiment.seed: must be below 4294967296; got 4294967296."),
    ("pruning: {enabled: 1}", "line 3: pruning.enabled: expected true or false; got 1."),
    ("dataset: {subset: 2}", "line 3: dataset.subset: expected text; got 2 (put it in quotes)."),
    ("dataset: {name: ' '}", "line 3: dataset.name: must not be empty."),
    ("metrics: {enabled: wanda}", "line 3: metrics.enabled: expected a list, for example [a, b]; got 'wanda'."),
    ("metrics: {random: 3}", "line 3: metrics.random: expected a mapping of keys to values; got 3."),
    ("metrics: {random: {seed: x}}", "line 3: metrics.random.seed: expected a whole number; got 'x'."),
    (
        "metrics: {random: {sed: 1}}",
        "line 3: metrics.random.sed: metric 'random' has no parameter 'sed'. Known: seed.",
    ),
    (
        "metrics: {wanda: {seed: 1}}",
        "line 3: metrics.wanda.seed: metric 'wanda' has no parameter 'seed'. Known: none.",
    ),
    (
        "calibration: {mode: line}",
        "line 3: calibration.mode: expected 'contiguous', 'lines' or 'chat'; got 'line'. Did you mean 'lines'?",
    ),
    ("experiment: {type: vision}", "expected 'llm_alignment', 'llm_supernode' or 'llm'; got 'vision'."),
    (
        "experiment: {device: cuda0}",
        "unknown device 'cuda0'. Did you mean 'cuda'? Known: auto, cpu, cuda, cuda:N, mps.",
    ),
    ("experiment: {name: a/b}", "it must hold no '/' or '\\' and not be '.' or '..'; got 'a/b'."),
    ("experiment: {name: ..}", "experiment.name: is used as a folder name"),
    # sparsities and fractions
    (
        "pruning:\n  ratios:\n  - 0.1\n  - 30",
        "line 6: pruning.ratios[1]: sparsity must be in [0, 1), the fraction of channels to remove; got 30. "
        "Did you mean 0.3 (30 %)?",
    ),
    ("pruning: {ratios: [1.0]}", "sparsity must be in [0, 1), the fraction of channels to remove; got 1."),
    ("pruning: {ratios: [-0.1]}", "the fraction of channels to remove; got -0.1."),
    ("pruning: {ratios: [.nan]}", "line 3: pruning.ratios[0]: expected a finite number; got nan."),
    ("pruning: {ratios: 0.3}", "line 3: pruning.ratios: expected a list, for example [a, b]; got 0.3."),
    ("pruning: {ratios: []}", "line 3: pruning.ratios: the list is empty; give at least one value."),
    ("pruning: {ratios: [0.1, 0.1]}", "line 3: pruning.ratios: 0.1 is listed twice; list each value once."),
    ("pruning: {sparsity_levels: [2]}", "line 3: pruning.sparsity_levels[0]: sparsity must be in [0, 1)"),
    (
        "supernode: {core_fraction: 10}",
        "must be in (0, 1), a fraction of the channels; got 10. Did you mean 0.1 (10 %)?",
    ),
    # names
    ("pruning: {algorithms: [wandas]}", "unknown metric 'wandas'. Did you mean 'wanda'? Known: activation_l2_norm"),
    ("pruning: {algorithms: [random, random]}", "pruning.algorithms: 'random' is listed twice; list each value once."),
    ("pruning: {allocator: globl}", "unknown allocator 'globl'. Did you mean 'global'? Known: global, halfway,"),
    ("pruning: {curves: {rounds: 1}}", "pruning.curves: would do nothing with 'allocator: local', which reads no"),
    ("pruning: {allocator: measured, curves: {shares: [50]}}", "pruning.curves.shares[0]: must be in (0, 1)"),
    ("pruning: {min_keep: 1.5}", "pruning.min_keep: must be a share of the channels in [0, 1], or a whole number"),
    ("pruning: {min_keep: {a: x}}", "expected a number, or a mapping such as {model.layers.0.mlp: 0.8}; got"),
    ("pruning: {reconstruct: bias, damping: 0.1}", "pruning.damping: would do nothing with 'reconstruct: bias'"),
    # not in this version, or never
    (
        "model: {model_id: m, reference_id: r}",
        "model.reference_id: would do nothing: no metric that is scored reads a reference model",
    ),
    (
        "supernode: {halo_fraction: 0.1}",
        "supernode.halo_fraction: would do nothing: no metric that is scored reads the halo",
    ),
    (
        "metrics: {enabled: [delta_alignment]}",
        "metrics.enabled[0]: 'delta_alignment' needs model.reference_id, the model before fine-tuning",
    ),
    (
        "supernode: {enabled: true, score_metric: supernode_protection_score}",
        "'supernode_protection_score' itself needs the core; the core needs a metric without",
    ),
    (
        "pruning: {structured: false}",
        "line 3: pruning.structured: 'structured: false' is not available in this version.",
    ),
    (
        "pruning: {dependency_aware: false}",
        "line 3: pruning.dependency_aware: cannot be false: a channel is its coupled weights (its rows of gate and up, "
        "its column of down), so they are removed together. Remove this key.",
    ),
    # between keys
    (
        "calibration: {num_samples: 8}\nmetrics:\n  scar: {num_samples: 9}",
        "line 5: metrics.scar.num_samples: must be at most calibration.num_samples = 8, because the backward pass runs "
        "on the calibration's windows; got 9.",
    ),
    ("metrics: {scar: {max_length: 513}}", "must be at most calibration.max_length = 512"),
    (
        "metrics: {enabled: [wanda, scar_taylor], scar: {enabled: false}}",
        "line 3: metrics.enabled[1]: 'scar_taylor' needs the backward pass, but metrics.scar.enabled is false. "
        "Set it to true or choose another metric.",
    ),
    (
        "metrics: {scar: {enabled: false}}\nsupernode: {enabled: true}",
        "line 4: supernode.score_metric: 'scar_loss_proxy' needs the backward pass",
    ),
    (
        "metrics: {scar: {enabled: false}}\npruning: {enabled: true}",
        "line 4: pruning.algorithms[0]: 'scar_loss_proxy' needs the backward pass",
    ),
    (
        "calibration: {answers_only: true}",
        "line 3: calibration.answers_only: needs 'mode: chat', the only one that knows which tokens are answers; got "
        "'contiguous'.",
    ),
    (
        "supernode: {core_fraction: 0.1, top_k: 3}",
        "line 3: supernode.top_k: replaces core_fraction, and both are given. Keep one.",
    ),
    (
        "supernode: {enabled: true, core_fraction: 0.3}\npruning: {enabled: true, ratios: [0.5, 0.8]}",
        "line 4: pruning.ratios[1]: cannot remove 0.8 of the channels while supernode.protect_core keeps 0.3.",
    ),
    ("model: {model_id: m, model_kwargs: {torch_dtype: x}}", "model.model_kwargs.torch_dtype: is set by model.dtype."),
    ("model: {model_id: m, tokenizer_kwargs: {revision: x}}", "is set by model.revision. Write it there."),
    ("model: {model_id: m, model_kwargs: {ignore_mismatched_sizes: true}}", "would load weights at random. Remove it."),
    ("model: {model_id: m, model_kwargs: {use_safetensors: false}}", "is set by model.allow_pickle. Write it there."),
    ("model: {model_id: m, tokenizer_kwargs: {token: x}}", "is set by model.token_env. Write it there."),
    (
        "model: {model_id: m, max_memory: {'0': 8GiB}}",
        "model.max_memory: would do nothing without model.device_map. Set that, for example to auto, or remove this",
    ),
    ("model: {model_id: m, offload_folder: x}", "model.offload_folder: would do nothing without model.device_map."),
    (
        "model: {model_id: m, device_map: auto, max_memory: {'0': much}}",
        "model.max_memory: the limit of '0' must be bytes or text such as 20GiB; got 'much'.",
    ),
    (
        "model: {model_id: m, device_map: auto, max_memory: 8GiB}",
        "expected a mapping from device to memory, such as {'0'",
    ),
    ("model: {model_id: m, offline: 1}", "model.offline: expected true or false; got 1."),
    ("model: {model_id: m, token: hf_x}", "model.token: unknown key 'token'. Did you mean 'token_env'?"),
    ("model: {model_id: m, device_map: 3}", "expected text such as 'auto', or a mapping from module to device; got 3."),
    ("model: {model_id: m, tracked_layers: []}", "model.tracked_layers: the list is empty; give at least one value."),
    (
        "model: {model_id: m, model_kwargs: {a: [1, .nan]}}",
        "line 3: model.model_kwargs.a[1]: expected a finite number; got nan.",
    ),
    # texts
    (
        "dataset: {split: test}",
        "evaluation: the held-out text 'sotu test' is the same as that of dataset (the calibration). "
        "Give another evaluation.name or evaluation.split.",
    ),
    (
        "dataset: {name: a.txt}",
        "evaluation: the held-out text 'a.txt' is the same as that of dataset (the calibration). "
        "Give another evaluation.name.",
    ),
    (
        "dataset: {name: some/text}",
        "evaluation: no held-out split of 'some/text' is known. Give evaluation.split, or another evaluation.name.",
    ),
    (
        "evaluation:\n  extra: [{name: sotu}]",
        "line 4: evaluation.extra[0]: the held-out text 'sotu test' is the same as that of evaluation.",
    ),
    ("evaluation:\n  extra: [{name: a/b}]", "no held-out split of 'a/b' is known. Give evaluation.extra[0].split, or"),
    ("dataset: {split: trian}", "line 3: dataset.split: 'sotu' has no split 'trian'. Known: train, validation, test."),
    ("dataset: {streaming: true}", "dataset.streaming: has no meaning for 'sotu', a text that ships with ffnscope."),
    (
        "dataset: {name: a.txt, split: train}\nevaluation: {name: sotu}",
        "no meaning for 'a.txt', a local file. Remove it.",
    ),
    # YAML itself
    (
        "pruning:\n  enabled: true\n  enabled: false",
        "line 5: pruning.enabled: this key is given twice (first on line 4).",
    ),
    ("1: x", "line 3: a key must be text; got 1 (put it in quotes if it is meant as text)."),
    ("output: {dir: !!python/name:os.getcwd x}", "line 3: output.dir: the YAML tag !!python/name:os.getcwd is not"),
    (
        "output: {dir: !!binary aGk=}",
        "line 3: output.dir: the YAML tag !!binary is not supported; write a plain value.",
    ),
    ("output: !!set {a}", "line 3: output: the YAML tag !!set is not supported; write a plain value."),
    ("model: &a {model_id: m, model_kwargs: *a}", "line 3: model.model_kwargs: an anchor refers to itself."),
]


@pytest.mark.parametrize(("text", "expected"), FAULTS, ids=[text.replace("\n", " ") for text, _ in FAULTS])
def test_fault(problems, text, expected):
    head = "\n\n" if text.startswith("model:") else MODEL
    found = problems(head + text)
    assert any(expected in problem for problem in found), found
    assert all(problem.endswith((".", "?")) for problem in found)


WHOLE = [
    ("", "the file is empty; at least 'model: {model_id: ...}' is needed"),
    ("# nothing\n", "the file is empty; at least 'model: {model_id: ...}' is needed"),
    ("- a\n", "expected a mapping of blocks (model, calibration, ...); found a list"),
    ("text\n", "expected a mapping of blocks (model, calibration, ...); found 'text'"),
    ("a: [1\nb: 2\n", "line 2, column 2: not valid YAML: "),
    ("a:\n\tb: 1\n", "line 2, column 1: not valid YAML: while scanning for the next token, found character '\\t'"),
    ("a: 1\n---\nb: 2\n", "expected a single document in the stream, but found another document"),
    ("a: *b\n", "line 1, column 4: not valid YAML: found undefined alias 'b'"),
    (b"a: \xff\n", "line 1: the file is not UTF-8 text; save it as UTF-8"),
    (b"ok: 1\na: '\x00'\n", "not valid YAML: character "),
    ("a: " + "[" * 5000, "the YAML is nested too deeply"),
]


@pytest.mark.parametrize(("text", "expected"), WHOLE, ids=[expected[:40] for _, expected in WHOLE])
def test_not_a_configuration_at_all(problems, text, expected):
    (problem,) = problems(text)
    assert expected in problem


def test_tabs_get_a_hint(problems):
    assert problems("a:\n\tb: 1\n")[0].endswith("; indent with spaces, not tabs")


def test_anchors_cannot_explode(problems):
    rows = ["a: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"b{i}: &x{i + 1} [{', '.join([f'*x{i}'] * 10)}]" for i in range(8)]
    assert "values once its anchors are written out" in problems("\n".join(rows))[0]


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: 1 problem\n  - the file does not exist"):
        load_config(tmp_path / "none.yaml")


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="the file cannot be read: Is a directory"):
        load_config(tmp_path)


def test_model_id_is_required(problems):
    missing = "model.model_id: this key is required: a hub id, a local directory, a .gguf file, or package:DIST."
    assert problems("experiment: {}") == [missing]
    assert problems("model:\n  revision: x\n") == [f"line 1: {missing}"]
    assert problems("model:\n") == [f"line 1: {missing}"]


def test_all_problems_together_in_the_order_of_the_file(problems, tmp_path):
    found = problems(
        "model:\n"
        "  dtype: bf16\n"
        "modle: 1\n"
        "pruning:\n"
        "  enabled: true\n"
        "  ratios: [0.1, 30]\n"
        "  algorithms: [sparsgpt, random]\n"
        "metrics:\n"
        "  scar: {num_samples: 65}\n"
        "  random: {sed: 1}\n",
        "calibration.batch_size=0",
    )
    places = [problem.split(": ")[:2] for problem in found]
    assert places == [
        ["line 1", "model.model_id"],
        ["line 2", "model.dtype"],
        ["line 3", "modle"],
        ["line 6", "pruning.ratios[1]"],
        ["line 7", "pruning.algorithms[0]"],
        ["line 9", "metrics.scar.num_samples"],
        ["line 10", "metrics.random.sed"],
        ["--set calibration.batch_size", "calibration.batch_size"],
    ]


def test_two_faults_in_one_list_hide_no_other_of_their_block(problems):
    found = problems(MODEL + "metrics:\n  enabled: [wandas, scar_tailor]\n  random: {sed: 1}\n")
    places = [problem.split(": ")[1] for problem in found]
    assert places == ["metrics.enabled[0]", "metrics.enabled[1]", "metrics.random.sed"]


def test_a_problem_ends_with_one_full_stop(problems):
    assert problems(MODEL + "supernode: {enabled: true, halo_fraction: 0}\n") == [
        "line 3: supernode.halo_fraction: must be in (0, 1), a fraction of the channels; got 0."
    ]


def test_a_problem_of_an_override_has_the_override_as_its_place(problems):
    text = MODEL + "pruning: {enabled: true}\n"
    found = problems(text, "nosuch.key=1", "pruning.nosuch.key=2", "supernode.top_k=3", "supernode.core_fraction=0.1")
    places = [problem.split(": ")[:2] for problem in found]
    assert places == [
        ["--set nosuch.key", "nosuch"],
        ["--set pruning.nosuch.key", "pruning.nosuch"],
        ["--set supernode.top_k", "supernode.top_k"],
    ]


def test_what_an_override_leaves_out_has_no_place(problems):
    (problem,) = problems("experiment: {}\n", "model.dtype=float32")
    assert problem.startswith("model.model_id: this key is required")


def test_message_names_the_file_and_the_number_of_problems(load, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load("a: 1\nb: 2\n" + MODEL)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: 2 problems\n  - line 1: a: ")


def test_no_second_problem_follows_from_a_wrong_value(problems):
    found = problems(MODEL + "calibration: {num_samples: many}\nmetrics: {scar: {num_samples: 99}}")
    assert found == ["line 3: calibration.num_samples: expected a whole number; got 'many'."]


def test_same_text_is_allowed_when_nothing_is_evaluated(load):
    assert not load(MODEL + "dataset: {split: test}\nevaluation: {enabled: false}").evaluation.enabled


# --- aliases ---


def test_aliases(load):
    config = load("model: {model_id: m, torch_dtype: float16}\npruning: {sparsity_levels: [0.25]}")
    assert (config.model.dtype, config.pruning.ratios) == ("float16", (0.25,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {model_id: m, dtype: auto,\n torch_dtype: auto}",
            "line 2: model.torch_dtype: is another name of model.dtype, and both are given. Keep one.",
        ),
        (
            MODEL + "pruning:\n  sparsity_levels: [0.1]\n  ratios: [0.2]",
            "line 4: pruning.sparsity_levels: is another name of pruning.ratios, and both are given. Keep one.",
        ),
    ],
)
def test_alias_and_name_together(problems, text, expected):
    assert problems(text) == [expected]


def test_problem_is_shown_under_the_name_that_was_written(problems):
    (found,) = problems("model:\n  model_id: m\n  torch_dtype: bf16\n")
    assert found.startswith("line 3: model.torch_dtype: expected 'auto', ")


# --- overrides ---


def test_overrides(load):
    config = load(
        MODEL + "pruning: {ratios: [0.1]}",
        "model.model_id=other/model",
        "pruning.ratios=[0.2, 0.4]",
        "metrics.random.seed=3",
        "metrics.scar.enabled=false",
        "experiment.seed=1",
        "experiment.seed=2",
        "output.dir=a=b",
        "supernode.core_fraction=1e-3",
    )
    assert config.model.model_id == "other/model"
    assert config.pruning.ratios == (0.2, 0.4)
    assert config.metric_arguments("random") == {"seed": 3}
    assert (config.metrics.scar.enabled, config.seed, config.output.dir) == (False, 2, "a=b")
    assert config.supernode.core_fraction == 0.001


@pytest.mark.parametrize(("key", "old"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype"), ("dtype", "dtype")])
def test_override_replaces_both_names(load, key, old):
    assert load(f"model: {{model_id: m, {old}: float16}}", f"model.{key}=float64").model.dtype == "float64"


def test_override_repairs_a_wrong_value(load):
    assert load(MODEL + "calibration: {num_samples: many}", "calibration.num_samples=4").calibration.num_samples == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "model.model_idd=x",
            "--set model.model_idd: model.model_idd: unknown key 'model_idd'. Did you mean 'model_id'?",
        ),
        ("model_id=x", "--set model_id: model_id: unknown key 'model_id'. Did you mean 'model.model_id'?"),
        ("model.model_id", "--set: expected block.key=value; got 'model.model_id'."),
        ("model..x=1", "--set: expected block.key=value; got 'model..x=1'."),
        ("=1", "--set: expected block.key=value; got '=1'."),
        ("pruning.ratios=[0.1", "--set pruning.ratios: pruning.ratios: line 1, column "),
        ("pruning.ratios=[0.1, 5]", "--set pruning.ratios: pruning.ratios[1]: sparsity must be in [0, 1)"),
        ("pruning.ratios.0=0.5", "pruning.ratios: expected a list, for example [a, b]; got a mapping."),
        ("model.revision=12", "model.revision: expected text; got 12 (put it in quotes)."),
        ("output.dir=!!set {a}", "--set output.dir: output.dir: the YAML tag !!set is not supported"),
    ],
)
def test_wrong_override(problems, override, expected):
    (found,) = problems(MODEL, override)
    assert expected in found


# --- plain YAML ---


def test_environment_variables_are_not_substituted(load):
    assert load("model: {model_id: '${HOME}/model'}").model.model_id == "${HOME}/model"


def test_numbers_with_an_exponent_and_text_that_looks_like_a_date(load):
    config = load(
        MODEL + "supernode: {core_fraction: 1e-3}\ndataset: {name: a/b, subset: 2024-01-01, split: '1e3'}\n"
        "evaluation: {split: test}"
    )
    assert (config.supernode.core_fraction, config.dataset.subset, config.dataset.split) == (0.001, "2024-01-01", "1e3")


def test_byte_order_mark(load):
    assert load(b"\xef\xbb\xbf" + MODEL.encode()).model.model_id == "m"


def test_anchors_and_merge_keys(load):
    config = load(
        MODEL + "dataset: &text {name: c4, subset: en}\n"
        "evaluation:\n  <<: *text\n  subset: de\n  extra:\n    - {<<: *text, split: 'train[:1%]'}\n"
    )
    assert (config.evaluation.name, config.evaluation.subset) == ("c4", "de")
    assert (config.evaluation.extra[0].name, config.evaluation.extra[0].subset) == ("c4", "en")


# --- there and back ---


def test_dump_is_accepted_back_and_equal(load):
    config = load(
        "model: {model_id: m, torch_dtype: float16, model_kwargs: {a: [1, {b: null}], c: '1e3'}, device_map: {'': 0}}\n"
        "metrics: {enabled: [wanda], random: {seed: 3}}\n"
        "supernode: {enabled: true, top_k: 4}\n"
        "pruning: {enabled: true, sparsity_levels: [0, 1.0e-5], algorithms: [random]}\n"
        "dataset: {name: a.txt}\n"
        "evaluation: {name: b.jsonl, text_field: 'on', extra: [{name: sotu}],\n"
        "  samples: {prompts: ['a\\n b: ü', '2024-01-01']}}\n"
    )
    text = dump_config(config)
    assert load(text) == config
    assert dump_config(load(text)) == text


def test_how_a_model_is_loaded(load, monkeypatch):
    config = load(
        "model: {model_id: m, revision: v1, device_map: auto, max_memory: {'0': 20GiB, cpu: 1000},\n"
        "  offload_folder: off_, cache_dir: hub, offline: true, allow_pickle: true, token_env: MY_TOKEN}\n"
    )
    assert config.model.max_memory == {"0": "20GiB", "cpu": 1000}
    assert load(dump_config(config)) == config
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    source = model_source(config)
    assert (source.revision, source.max_memory, source.offload_folder) == ("v1", {"0": "20GiB", "cpu": 1000}, "off_")
    assert (source.cache_dir, source.offline, source.allow_pickle, source.token) == ("hub", True, True, "hf_secret")
    assert "hf_secret" not in dump_config(config)


def test_resolving_twice_changes_nothing(load):
    first = load(MODEL)
    assert load(dump_config(first)) == first


def test_dict_is_not_changed_and_names_its_source():
    given = {"model": {"model_id": "m", "torch_dtype": "float16"}, "pruning": None}
    before = copy.deepcopy(given)
    assert config_from_dict(given).model.dtype == "float16"
    assert given == before
    with pytest.raises(ConfigError, match=r"^<dict>: 1 problem\n  - model\.model_id: this key is required"):
        config_from_dict({})
    with pytest.raises(ConfigError, match=r"^notebook: "):
        config_from_dict({}, source="notebook")


KEYS = ["model", "model_id", "metrics", "scar", "random", "pruning", "ratios", "sparsity_levels", "evaluation", "extra"]
KEYS += [
    "name",
    "split",
    "supernode",
    "top_k",
    "core_fraction",
    "dataset",
    "torch_dtype",
    "model_kwargs",
    "x",
    "enabled",
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from([0.5, "sotu", "wanda"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_anything_is_either_accepted_or_refused_with_a_config_error(value):
    value["model"] = value["model"] if isinstance(value.get("model"), dict) else {}
    value["model"].setdefault("model_id", "m")
    try:
        config = config_from_dict(value)
    except ConfigError as error:
        assert error.problems
    else:
        assert config_from_dict(parse_document(dump_config(config)).data) == config


# --- the examples ---


@pytest.mark.parametrize(
    "path", sorted(p for p in EXAMPLES.glob("*.yaml") if p.stem not in ("guide", "sweep")), ids=lambda p: p.stem
)
def test_example_is_valid(path):
    config = load_config(path)
    assert config.pruning.enabled or config.contextual.enabled
    assert config.evaluation.enabled


def test_examples_are_there():
    expected = {"quickstart", "gpt2_fast_test", "llama3_8b", "mistral_7b", "qwen2_7b", "olmo2_7b", "guide"}
    assert expected <= {path.stem for path in EXAMPLES.glob("*.yaml")}


def test_guide_is_accepted_whole():
    config = load_config(EXAMPLES / "guide.yaml")
    wanted = ("magnitude", "wanda", "sparsegpt", "scar_loss_proxy", "supernode_protection_score")
    assert config.pruning.algorithms == wanted
    assert config.supernode.halo_fraction == 0.1
    assert config.evaluation_text.words == "wikitext wikitext-2-raw-v1 test"
