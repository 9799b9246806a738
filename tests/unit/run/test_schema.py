"""The blocks, their defaults, and what a configuration answers about itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pydantic
import pytest

from ffnscope.errors import ConfigError
from ffnscope.io import write_json
from ffnscope.registry import METRICS
from ffnscope.rules import Metric
from ffnscope.run.explain import known_keys
from ffnscope.run.json_schema import json_schema
from ffnscope.run.load import config_from_dict
from ffnscope.run.planned import PLANNED_KEYS
from ffnscope.run.schema import RunConfig
from ffnscope.run.texts import SHIPPED_TEXTS, TextSource, held_out_split

ROOT = Path(__file__).parents[3]


def make(**blocks) -> RunConfig:
    return config_from_dict({"model": {"model_id": "m"}, **blocks})


def refused(**blocks) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(**blocks)
    return caught.value.problems


def test_defaults():
    config = make()
    assert (config.experiment.name, config.experiment.device, config.seed) == ("ffnscope_run", "auto", 42)
    assert (config.dataset.name, config.dataset.split, config.dataset.batch_size) == ("sotu", "train", 1)
    assert (config.calibration.num_samples, config.calibration.max_length) == (64, 512)
    assert (config.supernode.core_fraction, config.supernode.top_k) == (0.01, None)
    assert (config.pruning.enabled, config.pruning.ratios) == (False, (0.1, 0.3, 0.5))
    assert config.evaluation_text == TextSource(name="sotu", split="test")
    assert config.output_dir == Path("runs/ffnscope_run")


def test_blocks_are_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        make().experiment.seed = 1


def test_empty_block_is_all_defaults():
    assert make(pruning=None, metrics={"scar": None}, evaluation={"samples": None}) == make()


def test_what_follows_from_other_keys_is_filled_in():
    config = make(
        experiment={"name": "x", "seed": 7},
        calibration={"num_samples": 10, "max_length": 100},
        metrics={"scar": {"max_length": 50}},
    )
    assert config.calibration.seed == config.seed == 7
    assert (config.metrics.scar.num_samples, config.metrics.scar.max_length) == (10, 50)
    assert (config.scar_num_samples, config.scar_max_length) == (10, 50)
    assert config.evaluation.max_length == config.evaluation_max_length == 100
    assert (config.evaluation.name, config.evaluation.split, config.output.dir) == ("sotu", "test", "runs/x")


def test_top_k_replaces_core_fraction():
    assert make(supernode={"top_k": 3}).supernode.core_fraction is None


def test_output_dir_expands_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert make(output={"dir": "~/out"}).output_dir == Path("/home/someone/out")


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, "test") for name in SHIPPED_TEXTS), ("wikitext", "test"), ("allenai/c4", "validation"), ("other", None)],
)
def test_held_out_split(name, split):
    assert held_out_split(name) == split


def test_same_dataset_is_inherited_by_the_evaluation():
    dataset = {"name": "c4", "subset": "en", "streaming": True, "text_field": "text", "revision": "r"}
    assert make(dataset=dataset).evaluation_text == TextSource(**dataset, split="validation")


def test_other_dataset_inherits_nothing():
    config = make(dataset={"name": "c4", "subset": "en", "streaming": True}, evaluation={"name": "sotu"})
    assert config.evaluation_text == TextSource(name="sotu", split="test")


def test_local_file_has_no_split():
    config = make(dataset={"name": "a.txt"}, evaluation={"name": "b.txt", "extra": [{"name": "c.jsonl"}]})
    assert config.dataset.split is None
    assert [text.split for text in config.evaluation_texts] == [None, None]
    assert config.evaluation_texts[1].words == "c.jsonl"


def test_two_names_of_one_text(tmp_path, monkeypatch):
    calibration = {"name": "wikitext", "split": "test"}
    subset = {"subset": "wikitext-2-raw-v1"}
    (problem,) = refused(dataset=calibration, evaluation={"name": "Salesforce/wikitext", **subset})
    assert "'Salesforce/wikitext wikitext-2-raw-v1 test' is the same as that of dataset (the calibration)" in problem
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (problem,) = refused(dataset={"name": "rows"}, evaluation={"name": "./rows", "split": "train"})
    assert "the held-out text './rows train' is the same" in problem
    (problem,) = refused(dataset={"name": "a.txt"}, evaluation={"name": str(tmp_path / "a.txt")})
    assert "is the same as that of dataset" in problem


def test_extra_texts_get_their_held_out_split():
    config = make(evaluation={"extra": [{"name": "pydoc_topics"}, {"name": "c4", "subset": "en"}]})
    assert [text.split for text in config.evaluation_texts] == ["test", "test", "validation"]
    assert config.evaluation.extra[1].split == "validation"


def test_metric_names_are_those_of_enabled_parts():
    scar = tuple(name for name in METRICS.names() if name.startswith("scar_"))
    assert make().metric_names == scar
    off = {"scar": {"enabled": False}, "enabled": ["wanda"]}
    assert make(metrics=off).metric_names == ("wanda",)
    pruned = make(
        metrics=off,
        pruning={"enabled": True, "algorithms": ["random", "wanda"]},
        supernode={"enabled": True, "score_metric": "activation_l2_norm"},
    )
    assert pruned.metric_names == ("random", "wanda", "activation_l2_norm")


def test_metric_arguments_come_from_the_signature():
    config = make(metrics={"random": {"seed": 3}})
    assert config.metrics.params == {"random": {"seed": 3}}
    assert config.metric_arguments("random") == {"seed": 3}
    assert config.metric_arguments("wanda") == {}


@pytest.fixture
def own_metric(monkeypatch):
    """A metric of another package, with parameters of several types and one that must be given."""

    def score(stats, weights, *, weights_of: tuple[str, ...], copy: float = 0.5, anything=None): ...

    METRICS.names()
    item = Metric("own", score, (), "", 1, "own", "")
    monkeypatch.setitem(METRICS._items, "own", item)
    return item


def test_typed_parameters_of_another_package(own_metric):
    config = make(metrics={"enabled": ["own"], "own": {"weights_of": ["a", "b"], "copy": 1, "anything": [1]}})
    assert config.metric_arguments("own") == {"weights_of": ("a", "b"), "copy": 1.0, "anything": [1]}


def test_required_parameter_is_asked_for_where_the_metric_is_used(own_metric):
    assert make().metrics.params == {}
    for use in ({"metrics": {"enabled": ["own"]}}, {"pruning": {"enabled": True, "algorithms": ["own"]}}):
        assert refused(**use) == ["metrics.own.weights_of: this key is required."]


def test_wrong_parameters_are_all_reported(own_metric):
    assert refused(metrics={"own": {"weights_of": "a", "copy": "x", "cpy": 1}}) == [
        "metrics.own.weights_of: expected a list, for example [a, b]; got 'a'.",
        "metrics.own.copy: expected a number; got 'x'.",
        "metrics.own.cpy: metric 'own' has no parameter 'cpy'. Known: weights_of, copy, anything.",
    ]


def test_planned_keys_are_keys_of_the_schema():
    assert {tuple(key.split(".")) for key in PLANNED_KEYS} <= set(known_keys())


@pytest.mark.parametrize("key", PLANNED_KEYS)
def test_planned_key_may_be_written_with_its_default(key):
    block, name = key.split(".")
    blocks = {"model": {"model_id": "m"}}
    blocks.setdefault(block, {})[name] = PLANNED_KEYS[key]
    assert config_from_dict(blocks) == make()


def test_json_schema_knows_every_key():
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    for path in known_keys():
        block = schema["properties"]
        for key in path:
            node = block[key]
            optional = (one["$ref"] for one in node.get("anyOf", ()) if "$ref" in one)
            reference = node.get("$ref") or node.get("items", {}).get("$ref") or next(optional, None)
            block = schema["$defs"][reference.rsplit("/", 1)[-1]]["properties"] if reference else {}


def test_json_schema_offers_names_and_refuses_typos():
    schema = json_schema()["$defs"]
    offered = schema["Pruning"]["properties"]["algorithms"]["items"]["anyOf"][0]["enum"]
    assert "scar_loss_proxy" in offered
    assert schema["Pruning"]["properties"]["allocator"]["anyOf"][0]["enum"] == [
        "local",
        "global",
        "halfway",
        "standardised",
        "outliers",
        "measured",
    ]
    assert schema["Pruning"]["additionalProperties"] is False
    assert schema["Metrics"]["properties"]["random"]["properties"]["seed"]["type"] == "integer"
    assert "x-names-of" not in json.dumps(schema)


def test_committed_json_schema_is_current(tmp_path):
    write_json(tmp_path / "schema.json", json_schema())
    current = (tmp_path / "schema.json").read_text(encoding="utf-8")
    committed = (ROOT / "docs" / "ffnscope.schema.json").read_text(encoding="utf-8")
    assert committed == current, "run: python tools/write_schema.py"


def test_json_schema_takes_a_sweep():
    schema = json_schema()
    sweep = schema["properties"]["sweep"]
    assert sweep["properties"]["executor"]["enum"] == ["sequential", "auto", "ray", "submitit"]
    (dotted,) = sweep["patternProperties"]
    assert re.search(dotted, "experiment.seed")
    assert not re.search(dotted, "method")
    assert sweep["properties"]["resources"]["additionalProperties"]["$ref"].rsplit("/", 1)[-1] in schema["$defs"]


def test_json_schema_wants_a_model_unless_cells_name_theirs():
    schema = json_schema()
    sweep, one = schema["anyOf"]
    assert sweep == {"required": ["sweep"]}
    assert one == {"required": ["model"], "properties": {"model": {"required": ["model_id"]}}}
    assert "required" not in schema
    assert "required" not in schema["$defs"]["Model"]
