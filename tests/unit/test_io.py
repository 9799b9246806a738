from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faults import small_files
from ffnscope import io
from ffnscope.errors import ArtifactError, NonFiniteError, UsageError
from ffnscope.saving import check_writable, replacing
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores


@pytest.fixture
def plan(site: FFNSite) -> PruningPlan:
    other = replace(site, layer=1, path="layers.1.mlp")
    kept = {site: torch.tensor([0, 2, 5]), other: torch.tensor([1, 2])}
    facts = {"hash": "abc", "params": {"seed": 1}}
    return PruningPlan(kept, "wanda", "global", Budget(0.5, 1, 2), {site: torch.tensor([2])}, facts)


def same(first: PruningPlan, second: PruningPlan) -> bool:
    pairs = [(first.kept, second.kept), (first.protected, second.protected)]
    return (
        first.budget == second.budget
        and (first.metric, first.allocator, first.provenance) == (second.metric, second.allocator, second.provenance)
        and all(list(a) == list(b) and all(torch.equal(a[s], b[s]) for s in a) for a, b in pairs)
    )


class TestAtomic:
    @pytest.mark.parametrize("kind", ["json", "tensors"])
    def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with small_files(), pytest.raises(ArtifactError, match=r"cannot write .*file: .*[Ff]ile too large"):
            if kind == "json":
                io.write_json(path, list(range(1000)))
            else:
                io.write_tensors(path, {"a": torch.zeros(1000)}, {})
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
    def test_an_interrupt_leaves_nothing_behind(self, tmp_path: Path, failure: type[BaseException]) -> None:
        path = tmp_path / "file"
        with pytest.raises(failure), replacing(path) as part:
            part.write_text("half")
            raise failure
        assert list(tmp_path.iterdir()) == []

    def test_folders_are_made_and_the_file_is_readable_by_others_as_the_umask_says(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "c.txt"
        io.write_text(path, "ä\n")
        plain = tmp_path / "plain"
        plain.touch()
        assert path.read_bytes() == "ä\n".encode()
        assert path.stat().st_mode == plain.stat().st_mode

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ArtifactError, match=r"cannot write .*c.txt: (File exists|Not a directory)"):
            io.write_text(tmp_path / "file" / "c.txt", "")

    def test_whether_a_folder_can_be_written_is_tried_without_a_trace(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "new" / "deep"):
            check_writable(folder)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(ArtifactError, match=r"cannot write .*file/new: Not a directory"):
            check_writable(tmp_path / "file" / "new")

    def test_a_folder_of_a_file_system_that_takes_no_files(self) -> None:
        if not Path("/proc/self").exists():
            pytest.skip("this system has no /proc")
        with pytest.raises(ArtifactError, match=r"cannot write /proc/new: "):
            check_writable(Path("/proc/new"))

    def test_two_writers_do_not_meet(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        writers = [threading.Thread(target=io.write_text, args=(path, str(i) * 100_000)) for i in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        text = path.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
        assert list(tmp_path.iterdir()) == [path]


class TestJson:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        io.write_json(path, {"path": Path("x/y"), "values": torch.tensor([1.5, 2.0]), "text": "ä"})
        assert io.read_json(path) == {"path": "x/y", "values": [1.5, 2.0], "text": "ä"}
        assert path.read_text().endswith("\n")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor([float("nan")])], ids=str)
    def test_nan_is_refused(self, tmp_path: Path, bad: Any) -> None:
        path = tmp_path / "a.json"
        with pytest.raises(ArtifactError, match=r"a.json would hold NaN or infinity, which JSON cannot"):
            io.write_json(path, {"a": bad})
        with pytest.raises(ArtifactError, match=r"a.st would hold NaN or infinity"):
            io.write_tensors(tmp_path / "a.st", {}, {"a": bad})
        assert list(tmp_path.iterdir()) == []

    def test_nan_in_a_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text('{"a": NaN}')
        with pytest.raises(ArtifactError, match=r"cannot be read as JSON \(NaN is not JSON\)"):
            io.read_json(path)

    @pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"], ids=["empty", "cut", "binary"])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.json"
        path.write_bytes(content)
        with pytest.raises(
            ArtifactError, match=r"a.json cannot be read as JSON .*: damaged, or another kind of file\."
        ):
            io.read_json(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"a.json does not exist"):
            io.read_json(tmp_path / "a.json")

    def test_what_has_no_json_form(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="cannot write set as JSON"):
            io.write_json(tmp_path / "a.json", {1})


def test_csv(tmp_path: Path) -> None:
    io.write_csv(tmp_path / "a.csv", [{"a": 1, "b": "x,y"}, {"a": None, "b": 'say "z"'}])
    assert (tmp_path / "a.csv").read_bytes() == b'a,b\n1,"x,y"\n,"say ""z"""\n'
    io.write_csv(tmp_path / "b.csv", [])
    assert (tmp_path / "b.csv").read_bytes() == b""


class TestTensors:
    def test_round_trip_of_every_form(self, tmp_path: Path) -> None:
        whole = torch.arange(12, dtype=torch.float64).reshape(3, 4)
        tensors = {
            "view": whole[0],
            "other_view": whole[1:],
            "transposed": whole.T,
            "again": whole[0],
            "half": torch.ones(2, dtype=torch.bfloat16),
            "mask": torch.tensor([True, False]),
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 3),
            "gradient": torch.ones(2, requires_grad=True),
        }
        io.write_tensors(tmp_path / "a.st", tensors, {"n": 1})
        found, facts = io.read_tensors(tmp_path / "a.st")
        assert facts == io.read_facts(tmp_path / "a.st") == {"schema": io.SCHEMA, "n": 1}
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)

    @pytest.mark.parametrize("keep", [0, 5, 60, -1])
    def test_damaged(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "a.st"
        io.write_tensors(path, {"a": torch.arange(100)}, {})
        path.write_bytes(path.read_bytes()[:keep])
        for read in (io.read_tensors, io.read_facts):
            with pytest.raises(ArtifactError, match=r"a.st cannot be read .*: damaged, or another kind of file\."):
                read(path)

    def test_missing_and_foreign(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        with pytest.raises(ArtifactError, match=r"a.st does not exist"):
            io.read_tensors(tmp_path / "a.st")
        save_file({"a": torch.zeros(1)}, tmp_path / "a.st")
        for read in (io.read_tensors, io.read_facts):
            with pytest.raises(ArtifactError, match=r"is a safetensors file, but ffnscope did not write it"):
                read(tmp_path / "a.st")


class TestStatsAndScores:
    @pytest.fixture
    def stats(self, site: FFNSite) -> list[ChannelStats]:
        values = {"act_sq": torch.arange(6, dtype=torch.float64), "act_hist": torch.ones(3, 6, dtype=torch.int32)}
        counts, reductions = {"act_sq": 8, "act_hist": 2}, {"act_sq": "sum", "act_hist": "sum"}
        return [
            ChannelStats(s, values, counts, reductions)  # type: ignore[arg-type]
            for s in (site, replace(site, layer=1, path="layers.1.mlp"))
        ]

    def test_stats_round_trip(self, tmp_path: Path, stats: list[ChannelStats]) -> None:
        io.write_stats(tmp_path / "a.st", stats, {"text": "t"})
        found, facts = io.read_stats(tmp_path / "a.st")
        assert list(found) == [s.site for s in stats]
        assert facts == {"kind": "statistics", "schema": 1, "text": "t"}
        for part in stats:
            back = found[part.site]
            assert (back.counts, back.reductions) == (part.counts, part.reductions)
            assert all(
                torch.equal(back.values[k], v) and back.values[k].dtype == v.dtype for k, v in part.values.items()
            )

    def test_scores_round_trip(self, tmp_path: Path, site: FFNSite) -> None:
        other = replace(site, layer=1, path="layers.1.mlp")
        first = Scores("wanda", {site: torch.rand(6), other: torch.rand(6)}, {"params": {"a": 1}})
        second = Scores("random", {other: torch.rand(6).double()})
        io.write_scores(tmp_path / "a.st", [first, second], {"text": "t"})
        found, facts = io.read_scores(tmp_path / "a.st")
        assert list(found) == ["wanda", "random"]
        assert facts["text"] == "t"
        for scores in (first, second):
            back = found[scores.metric]
            assert back.sites == scores.sites and back.facts == scores.facts
            assert all(torch.equal(back.values[s], v) for s, v in scores.values.items())

    def test_another_kind(self, tmp_path: Path, stats: list[ChannelStats]) -> None:
        io.write_stats(tmp_path / "a.st", stats, {})
        with pytest.raises(ArtifactError, match=r"a.st holds 'statistics'; expected a file of kind 'scores'"):
            io.read_scores(tmp_path / "a.st")

    def test_something_missing_inside(self, tmp_path: Path, stats: list[ChannelStats]) -> None:
        path = tmp_path / "a.st"
        io.write_stats(path, stats, {})
        tensors, facts = io.read_tensors(path)
        del tensors["layers.1.mlp/act_sq"]
        io.write_tensors(path, tensors, facts)
        message = r"a.st is not a complete file of kind 'statistics': 'layers.1.mlp/act_sq' is missing"
        with pytest.raises(ArtifactError, match=message):
            io.read_stats(path)

    def test_scores_that_became_nan(self, tmp_path: Path, site: FFNSite) -> None:
        path = tmp_path / "a.st"
        io.write_scores(path, [Scores("wanda", {site: torch.rand(6)})], {})
        tensors, facts = io.read_tensors(path)
        tensors["wanda/layers.0.mlp"][2] = float("nan")
        io.write_tensors(path, tensors, facts)
        with pytest.raises(NonFiniteError, match=r"a.st: metric 'wanda' is NaN or infinite for 1 of 6"):
            io.read_scores(path)

    def test_a_later_schema(self, tmp_path: Path) -> None:
        io.write_tensors(tmp_path / "a.st", {}, {"kind": "scores", "schema": 99})
        with pytest.raises(ArtifactError, match=r"a.st has schema 99; this version reads up to 1: update ffnscope"):
            io.read_scores(tmp_path / "a.st")


class TestPlan:
    def test_round_trip(self, tmp_path: Path, plan: PruningPlan) -> None:
        path = tmp_path / "plan.json"
        io.write_plan(path, plan)
        assert same(io.read_plan(path), plan)
        assert {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"} == io.plan_to_dict(plan)

    def test_a_norm_adapters_twins_and_runs(self, tmp_path: Path, site: FFNSite) -> None:
        special = replace(site, norm="norm", adapters=("a.1", "a.2"), twins=("layers.2.mlp",), runs=3)
        path = tmp_path / "plan.json"
        io.write_plan(path, PruningPlan({special: torch.arange(3)}, "random", "local", Budget(0.5)))
        assert list(io.read_plan(path).kept) == [special]
        io.write_scores(tmp_path / "a.st", [Scores("wanda", {special: torch.rand(6)})], {})
        assert io.read_scores(tmp_path / "a.st")[0]["wanda"].sites == (special,)

    def test_a_plan_of_before_norms_adapters_twins_and_runs(self, tmp_path: Path, plan: PruningPlan) -> None:
        path = tmp_path / "plan.json"
        value = io.plan_to_dict(plan)
        for row in value["sites"]:
            for name in ("norm", "adapters", "twins", "runs"):
                del row["site"][name]
        path.write_text(json.dumps(value))
        assert same(io.read_plan(path), plan)

    def test_one_line_per_site(self, tmp_path: Path, plan: PruningPlan) -> None:
        path = tmp_path / "plan.json"
        io.write_plan(path, plan)
        assert sum('"kept": [' in line for line in path.read_text().splitlines()) == len(plan.kept)

    def test_an_edit_by_hand(self, tmp_path: Path, plan: PruningPlan, site: FFNSite) -> None:
        path = tmp_path / "plan.json"
        io.write_plan(path, plan)
        path.write_text(path.read_text().replace("[0, 2, 5]", "[0, 1, 2, 5]"))
        with pytest.warns(UserWarning, match=r"plan.json was edited \(then delete its line 'checksum'\) or is damaged"):
            assert io.read_plan(path).kept[site].tolist() == [0, 1, 2, 5]
        lines = [line for line in path.read_text().splitlines() if '"checksum"' not in line]
        path.write_text("\n".join(lines))
        assert io.read_plan(path).kept[site].tolist() == [0, 1, 2, 5]

    def test_every_flipped_bit_of_a_channel_is_told(self, tmp_path: Path, plan: PruningPlan) -> None:
        path = tmp_path / "plan.json"
        io.write_plan(path, plan)
        whole = path.read_bytes()
        start = whole.index(b'"kept": [') + len(b'"kept": [')
        for place in range(start, whole.index(b"]", start)):
            for bit in range(8):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                with pytest.raises((ArtifactError, UsageError, UserWarning)):
                    io.read_plan(path)

    def test_another_layout_of_the_same_plan_is_no_edit(self, tmp_path: Path, plan: PruningPlan) -> None:
        path = tmp_path / "plan.json"
        io.write_plan(path, plan)
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
        assert same(io.read_plan(path), plan)

    @pytest.mark.parametrize(
        ("old", "new", "error", "message"),
        [
            ("[0, 2, 5]", "[0, 2, 6]", UsageError, r"plan.json: plan for layers.0.mlp: kept channels must be unique"),
            ("[0, 2, 5]", "[0, 2.5]", ArtifactError, r"kind 'plan': channels must be a list of integers"),
            ("[0, 2, 5]", "[0, true]", ArtifactError, r"channels must be a list of integers"),
            ("[0, 2, 5]", '"all"', ArtifactError, r"channels must be a list of integers"),
            ("[0, 2, 5]", "[]", UsageError, r"plan.json: plan for layers.0.mlp: .*non-empty"),
            (
                '"sparsity": 0.5,\n    "multiple_of"',
                '"multiple_of"',
                ArtifactError,
                r"not a complete file of kind 'plan'",
            ),
            ('"metric"', '"metrics"', ArtifactError, r"kind 'plan': 'metric' is missing"),
            ('"d_ff": 6', '"d_ff": "six"', ArtifactError, r"not a complete file of kind 'plan'"),
            ('"schema": 1', '"schema": 2', ArtifactError, r"has schema 2; this version reads up to 1"),
            ('"kind": "plan"', '"kind": "cake"', ArtifactError, r"holds 'cake'; expected a file of kind 'plan'"),
        ],
    )
    def test_impossible_edits(
        self, tmp_path: Path, plan: PruningPlan, old: str, new: str, error: type[Exception], message: str
    ) -> None:
        path = tmp_path / "plan.json"
        io.write_plan(path, plan)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(error, match=message) as caught:
            io.read_plan(path)
        assert "plan.json" in str(caught.value)

    def test_nan_in_provenance(self, tmp_path: Path, plan: PruningPlan) -> None:
        bad = replace(plan, provenance={"perplexity": float("nan")})
        with pytest.raises(ArtifactError, match=r"plan.json would hold NaN or infinity"):
            io.write_plan(tmp_path / "plan.json", bad)

    def test_a_list_is_no_plan(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text("[]")
        with pytest.raises(ArtifactError, match=r"holds 'something else'; expected a file of kind 'plan'"):
            io.read_plan(tmp_path / "plan.json")


class TestHashes:
    def test_json(self) -> None:
        assert io.hash_json({"a": 1, "b": [2]}) == io.hash_json({"b": [2], "a": 1})
        assert io.hash_json({"a": 1}) != io.hash_json({"a": 2})

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert io.hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    @pytest.mark.parametrize(
        "other",
        [
            [("b", torch.tensor([1, 2]))],
            [("a", torch.tensor([2, 1]))],
            [("a", torch.tensor([[1, 2]]))],
            [("a", torch.tensor([1, 2], dtype=torch.int32))],
            [("a", torch.tensor([1, 2])), ("b", torch.zeros(0))],
        ],
        ids=["name", "values", "shape", "dtype", "more"],
    )
    def test_tensors_differ(self, other: list[tuple[str, Tensor]]) -> None:
        assert io.hash_tensors(other) != io.hash_tensors([("a", torch.tensor([1, 2]))])

    def test_tensors_agree_whatever_the_memory_layout(self) -> None:
        value = torch.randn(3, 4).bfloat16()
        assert io.hash_tensors([("a", value.T)]) == io.hash_tensors([("a", value.T.contiguous())])
        assert io.hash_tensors([("a", torch.tensor(True))]) != io.hash_tensors([("a", torch.tensor(False))])


class TestChecksums:
    def test_a_flipped_bit_of_tensors_or_facts_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        io.write_tensors(path, {"a": torch.arange(4.0), "b": torch.tensor([True])}, {"n": 3, "share": 0.25})
        content = path.read_bytes()
        for place in range(8, len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with contextlib.suppress(ArtifactError):
                tensors, facts = io.read_tensors(path)
                assert (tensors["a"].tolist(), tensors["b"].tolist()) == ([0, 1, 2, 3], [True])
                assert (facts["n"], facts["share"]) == (3, 0.25)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=r"a\.safetensors is damaged: the checksum of its tensors is not"):
            io.read_tensors(path)
        assert io.read_facts(path) == {"schema": io.SCHEMA, "n": 3, "share": 0.25}

    def test_a_changed_number_of_a_state_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "state.json"
        io.write_state(path, {"rows": [0.25, None], "n": 2})
        assert io.read_state(path) == {"rows": [0.25, None], "n": 2}
        path.write_text(path.read_text().replace("0.25", "0.35"))
        with pytest.raises(ArtifactError, match=r"state\.json is damaged: the checksum of its content"):
            io.read_state(path)

    def test_files_without_a_checksum_are_read(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        io.write_json(tmp_path / "state.json", {"n": 2})
        save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"ffnscope": '{"schema": 1, "kind": "x"}'})
        assert io.read_state(tmp_path / "state.json") == {"n": 2}
        assert io.read_tensors(tmp_path / "a.safetensors")[1] == {"schema": 1, "kind": "x"}
