"""Traces against hooks in a whole forward; resume, refusals, splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import flip_digit
from ffnscope.errors import ArtifactError, NotAvailableError, UnknownNameError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse import streaming
from ffnscope.sparse.ffn import ffn_of, find_activation
from ffnscope.sparse.split import split_documents
from ffnscope.sparse.traces import INDEX, read_traces
from ffnscope.sparse.tracing import TraceOptions, trace, traces_size
from offload import in_memory
from reference import exact, padded, slow_signals_of_all, text
from tiny import tiny
from tiny_moe import tiny_moe

ARCHS = ["llama", "llama_bias", "llama_relu", "phi3", "gpt2", "opt", "gemma2", "falcon", "gpt_neox", "starcoder2"]


class TestWhatIsTraced:
    @pytest.mark.parametrize("arch", ARCHS)
    def test_inputs_and_activations_are_those_of_the_model(self, arch: str, tmp_path: Path) -> None:
        model, windows = exact(arch), padded([16, 9, 12, 16, 5])
        sites = find_sites(model)
        found = trace(model, windows, tmp_path / "traces", options=TraceOptions(batch_size=2))
        signals = slow_signals_of_all(model, sites, windows)
        assert found.sites == tuple(sites)
        for site in sites:
            assert torch.allclose(found.x(site), signals[site]["x"], atol=1e-5)
            assert torch.allclose(ffn_of(model, site).h(found.x(site)), signals[site]["h"], atol=1e-4)
        assert torch.equal(found.document, torch.arange(5).repeat_interleave(windows.valid.sum(1)))
        assert torch.equal(found.window, found.document)

    @pytest.mark.parametrize(
        ("arch", "name"),
        [("llama", "silu"), ("llama_relu", "relu"), ("bloom", "gelu_pytorch_tanh"), ("gpt2", "gelu_new")],
    )
    def test_the_activation_is_found_where_the_config_names_none(self, arch: str, name: str, tmp_path: Path) -> None:
        model = tiny(arch)
        traces = trace(model, text(4), tmp_path / "t")
        site = traces.sites[0]
        assert traces.activation(site) == name
        x = traces.x(site)
        anonymous = replace(site, activation="unknown")
        assert find_activation(model, anonymous, x, ffn_of(model, site, name).h(x)) in (name, "gelu_pytorch_tanh")

    def test_contributions_are_norms_of_what_a_channel_adds(self, tmp_path: Path) -> None:
        model = exact("llama")
        site = find_sites(model)[0]
        ffn, x = ffn_of(model, site), trace(model, text(4), tmp_path / "t").x(site)
        each = ffn.h(x)[:, :, None] * ffn.weights.down.T
        assert torch.allclose(ffn.contributions(x), each.norm(dim=-1))

    @pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
    def test_experts_have_their_own_tokens(self, arch: str, tmp_path: Path) -> None:
        model, windows = tiny_moe(arch), padded([16, 9, 12, 16, 5])
        found = trace(model, windows, tmp_path / "traces", options=TraceOptions(batch_size=2))
        experts = [site for site in found.sites if site.expert is not None]
        assert experts
        first = [site for site in experts if site.layer == 0]
        tokens = torch.cat([found.tokens(site) for site in first])
        assert torch.equal(tokens.sort().values, torch.arange(windows.n_tokens).repeat_interleave(2))
        rows = [set(map(tuple, found.x(site).tolist())) for site in first]
        for site, own in zip(first, rows, strict=True):
            shared = [i for i, token in enumerate(found.tokens(site).tolist()) if (tokens == token).sum() == 2]
            assert all(any(tuple(found.x(site)[i].tolist()) in o for o in rows if o is not own) for i in shared)

    def test_no_chain_is_run_as_a_whole_in_groups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, windows = tiny("llama"), text(6)
        chain = trace(model, windows, tmp_path / "chain")

        def refuse(*args: Any) -> Any:
            raise NotAvailableError("no chain")

        monkeypatch.setattr(streaming, "open_blocks", refuse)
        monkeypatch.setattr(streaming, "HELD_BYTES", 1)
        rounds: list[tuple[int, int]] = []
        whole = trace(model, windows, tmp_path / "whole", on_round=lambda done, total: rounds.append((done, total)))
        assert rounds == [(1, 2), (2, 2)]
        for site in chain.sites:
            assert torch.allclose(chain.x(site), whole.x(site), atol=1e-5)

    def test_offloaded_weights(self, tmp_path: Path) -> None:
        whole = trace(tiny("llama"), text(6), tmp_path / "whole")
        found = trace(in_memory("llama", tmp_path), text(6), tmp_path / "offloaded")
        assert all(torch.equal(found.x(site), whole.x(site)) for site in whole.sites)
        assert found.facts["key"] == whole.facts["key"]

    def test_the_model_is_left_as_it_was(self, llama: Any, tmp_path: Path) -> None:
        llama.train()
        trace(llama, text(4), tmp_path / "traces")
        assert llama.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())

    def test_the_size_is_told_before(self, llama: Any, tmp_path: Path) -> None:
        windows = text(8)
        found = trace(llama, windows, tmp_path / "traces")
        arrays = sum(found.x(site).nbytes for site in found.sites) + found.document.nbytes + found.window.nbytes
        assert traces_size(llama, windows) == arrays == found.facts["bytes"]
        with pytest.raises(UsageError, match=r"would take 0\.0 MiB .*max_bytes"):
            trace(llama, windows, tmp_path / "other", options=TraceOptions(max_bytes=arrays - 1))
        assert not (tmp_path / "other").exists()


class TestParts:
    def test_no_document_is_in_two_parts(self, llama: Any, tmp_path: Path) -> None:
        found = trace(llama, text(10), tmp_path / "traces", options=TraceOptions(seed=3))
        site = found.sites[1]
        documents = [set(found.document[found.tokens(site, part)].tolist()) for part in ("fit", "calibrate", "test")]
        assert [len(d) for d in documents] == [6, 2, 2]
        assert set.union(*documents) == set(range(10))
        for part in ("fit", "calibrate", "test"):
            assert torch.equal(found.x(site, part), found.x(site)[found.tokens(site, part)])
        with pytest.raises(UnknownNameError, match="calibrate"):
            found.x(site, "validation")

    def test_the_split_depends_on_documents_and_seed_alone(self) -> None:
        document = torch.arange(50).repeat_interleave(torch.arange(1, 51))
        first = split_documents(document, 0)
        again = split_documents(document[torch.randperm(len(document))], 0)
        assert all(torch.equal(first[part], again[part]) for part in first)
        assert [len(part) for part in first.values()] == [30, 10, 10]
        other = split_documents(document, 1)
        assert not torch.equal(first["test"], other["test"])

    def test_three_documents_are_needed(self) -> None:
        assert [len(p) for p in split_documents(torch.tensor([4, 4, 9, 1])).values()] == [1, 1, 1]
        with pytest.raises(UsageError, match="at least 3 documents"):
            split_documents(torch.tensor([0, 0, 1]))

    def test_lookahead_gives_the_input_of_the_layer_before(self, llama: Any, tmp_path: Path) -> None:
        found = trace(llama, text(10), tmp_path / "traces")
        first, second = found.sites
        tokens = found.fit_tokens(second, lookahead=1)
        assert torch.equal(tokens.x, found.x(second, "fit"))
        assert tokens.earlier is not None
        assert torch.equal(tokens.earlier, found.x(first, "fit"))
        assert found.fit_tokens(second).earlier is None
        with pytest.raises(UsageError, match="lookahead 0"):
            found.fit_tokens(first, lookahead=1)


class TestFiles:
    def test_read_again(self, llama: Any, tmp_path: Path) -> None:
        found = trace(llama, text(6), tmp_path / "traces")
        again = read_traces(tmp_path / "traces")
        assert again.sites == found.sites
        assert all(torch.equal(again.x(site), found.x(site)) for site in found.sites)

    def test_a_call_that_was_cut_off_goes_on(self, llama: Any, tmp_path: Path) -> None:
        whole = trace(llama, text(6), tmp_path / "whole")

        class Cut(BaseException):
            pass

        def cut(done: int, total: int) -> None:
            raise Cut

        with pytest.raises(Cut):
            trace(llama, text(6), tmp_path / "traces", on_round=cut)
        assert not (tmp_path / "traces").exists()
        partial = tmp_path / ".traces.partial"
        (first,) = partial.glob("site_*")
        stamp = first.stat().st_mtime_ns
        found = trace(llama, text(6), tmp_path / "traces")
        assert not partial.exists()
        assert found.files[found.sites[0]].stat().st_mtime_ns == stamp
        assert all(torch.equal(found.x(site), whole.x(site)) for site in whole.sites)

    def test_what_is_complete_is_not_run_again(self, llama: Any, tmp_path: Path) -> None:
        trace(llama, text(6), tmp_path / "traces")
        rounds: list[int] = []
        trace(llama, text(6), tmp_path / "traces", on_round=lambda done, total: rounds.append(done))
        assert rounds == []

    def test_nothing_is_overwritten(self, llama: Any, tmp_path: Path) -> None:
        trace(llama, text(6), tmp_path / "traces")
        for other in (
            lambda: trace(llama, text(7), tmp_path / "traces"),
            lambda: trace(tiny("llama", seed=1), text(6), tmp_path / "traces"),
            lambda: trace(llama, text(6), tmp_path / "traces", options=TraceOptions(seed=1)),
        ):
            with pytest.raises(ArtifactError, match="another model, text, seed"):
                other()
        (tmp_path / "mine").mkdir()
        with pytest.raises(ArtifactError, match="something else"):
            trace(llama, text(6), tmp_path / "mine")

    def test_damaged_folders(self, llama: Any, tmp_path: Path) -> None:
        found = trace(llama, text(6), tmp_path / "other")
        flip_digit(tmp_path / "other" / INDEX, '"parts"')
        with pytest.raises(ArtifactError, match="is damaged: the checksum"):
            read_traces(tmp_path / "other")
        found = trace(llama, text(6), tmp_path / "traces")
        found.files[found.sites[0]].unlink()
        with pytest.raises(ArtifactError, match="Trace again"):
            read_traces(tmp_path / "traces")
        with pytest.raises(ArtifactError, match="does not exist"):
            read_traces(tmp_path / "none")
        with pytest.raises(UnknownNameError, match="traced site"):
            found.x(find_sites(tiny("gpt2"))[0])


class TestRefusals:
    @pytest.mark.parametrize(("arch", "why"), [("bitnet", "a norm before its down"), ("zamba2", "is used by")])
    def test_by_name(self, arch: str, why: str, tmp_path: Path) -> None:
        from tiny_all import tiny_causal_lm

        with pytest.raises(NotAvailableError, match=why):
            trace(tiny_causal_lm(arch), text(4), tmp_path / "traces")

    def test_another_function_between_the_projections(self, llama: Any) -> None:
        site = find_sites(llama)[0]
        ffn, x = ffn_of(llama, site), torch.randn(5, 32)
        assert find_activation(llama, site, x, ffn.h(x) * 1.001) == "silu"
        with pytest.raises(NotAvailableError, match="something else between its projections"):
            find_activation(llama, site, x, ffn.h(x).clamp(max=0.1))

    def test_experts_with_a_clipped_activation(self, tmp_path: Path) -> None:
        with pytest.raises(NotAvailableError, match="something else between its projections"):
            trace(tiny_moe("gpt_oss"), text(4), tmp_path / "traces")

    def test_an_unknown_activation(self, llama: Any) -> None:
        site = replace(find_sites(llama)[0], activation="unknown")
        with pytest.raises(NotAvailableError, match=r"'unknown'.*Traces"):
            ffn_of(llama, site)
        x = torch.randn(5, 32)
        assert torch.equal(ffn_of(llama, site, "silu").h(x), ffn_of(llama, find_sites(llama)[0]).h(x))

    def test_impossible_options(self) -> None:
        with pytest.raises(UsageError, match="batch_size"):
            TraceOptions(batch_size=0)
