"""A wrapped model decodes what its masked-dense definition gives, for every layout, and is put back as it was."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from ffnscope.apply.replace import replaced
from ffnscope.errors import ModelError, NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse import runtime as module
from ffnscope.sparse import timing
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.kernels.break_even import DENSITIES, RowTimes
from ffnscope.sparse.kernels.ffn import RowWeights
from ffnscope.sparse.monitor import MonitorOptions
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors import fixed
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.selector import Selector
from tiny import ARCHITECTURES, D_FF, logits, tiny, tokens
from tiny_all import tiny_causal_lm
from tiny_listed import tiny_listed
from tiny_moe import MIXTURES, TOP_K, tiny_moe

BY_PROJECTIONS = ("opt", "opt_projected", "bert", "bloom")


def selectors(model, density=0.3):
    """Random but fixed scores per token and site; the largest are kept."""
    return {site: top(site, round(density * site.d_ff)) for site in find_sites(model)}


def top(site, k):
    matrix = torch.randn(site.d_model, site.d_ff, generator=torch.Generator().manual_seed(site.layer))

    def select(x):
        best = (x.float() @ matrix).topk(k, dim=-1).indices
        return torch.zeros(len(x), site.d_ff, dtype=torch.bool).scatter_(1, best, True)

    return select


def keep(channels):
    """The same channels [d_ff] of bool for every token."""
    return lambda x: channels.expand(len(x), -1)


@torch.no_grad()
def decode(model, n_rows=1, steps=4):
    """Logits [steps + 1, rows, vocabulary] of a prompt and the steps after it."""
    ids = tokens(n_rows, 5 + steps)
    out = model(input_ids=ids[:, :5], attention_mask=torch.ones(n_rows, 5), use_cache=True)
    found = [out.logits[:, -1]]
    for step in range(steps):
        mask, given = torch.ones(n_rows, 6 + step), ids[:, 5 + step : 6 + step]
        out = model(input_ids=given, past_key_values=out.past_key_values, attention_mask=mask, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def wrapped(model, rules, *, n_rows=1, **options):
    """Logits and runtime of a wrapped model, which is put back."""
    runtime = wrap_(model, rules, **options)
    try:
        return decode(model, n_rows), runtime
    finally:
        unwrap_(model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestEveryLayout:
    @pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
    def test_equals_the_mask(self, arch, density) -> None:
        model = tiny(arch)
        rules, dense = selectors(model, density), decode(model)
        found, runtime = wrapped(model, rules, break_even=1.0)
        expected, masked = wrapped(model, rules, break_even=0.0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert set(runtime.levels.values()) == {"projections" if arch in BY_PROJECTIONS else "module"}
        for site, row in runtime.measured().items():
            share = round(density * site.d_ff) / site.d_ff
            assert (row.tokens, row.density, row.read, row.sparse_steps) == (
                4,
                pytest.approx(share),
                pytest.approx(share),
                1,
            )
        sparse_steps = {row.sparse_steps for row in masked.measured().values()}
        assert sparse_steps == ({1.0} if density == 0 else {0.0})
        assert torch.equal(found[0], dense[0])  # the prompt
        assert (density == 1.0) == torch.allclose(found, dense, atol=1e-4)

    def test_a_constant_selection_is_a_constant_mask(self, arch) -> None:
        """An independent definition: the removed channels are zero where down reads them."""
        model = tiny(arch)
        sites = find_sites(model)
        kept = torch.arange(sites[0].d_ff) % 3 > 0
        gone = (~kept).nonzero().flatten()
        found, runtime = wrapped(model, dict.fromkeys(sites, keep(kept)), break_even=1.0, prefill=True)
        assert runtime.measured()[sites[0]].sparse_steps == 1
        with replaced(model, {s: (gone, torch.zeros(len(gone))) for s in sites}):
            torch.testing.assert_close(found, decode(model), atol=1e-5, rtol=1e-5)

    def test_a_batch_reads_the_union(self, arch) -> None:
        model = tiny(arch)
        rules = selectors(model, 0.2)
        found, runtime = wrapped(model, rules, n_rows=3, break_even=1.0)
        expected, masked = wrapped(model, rules, n_rows=3, break_even=0.0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for site, row in runtime.measured().items():
            share = round(0.2 * site.d_ff) / site.d_ff
            assert row.tokens == 12 and row.density == pytest.approx(share)
            assert share < row.read <= 3 * share + 1e-9
            assert row.union == row.read == masked.measured()[site].union
        assert {row.read for row in masked.measured().values()} == {1.0}

    def test_put_back(self, arch) -> None:
        model = tiny(arch)
        before, dense = {n: p.clone() for n, p in model.state_dict().items()}, decode(model)
        wrap_(model, selectors(model), break_even=1.0)
        assert model.state_dict().keys() == before.keys()
        assert not torch.allclose(decode(model), dense, atol=1e-3)
        assert unwrap_(model) is model
        assert torch.equal(decode(model), dense)
        assert all(torch.equal(model.state_dict()[n], p) for n, p in before.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


class TestOtherLayouts:
    @pytest.mark.parametrize("n_rows", [1, 2])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.filterwarnings("ignore:rows are copied by torch")
    def test_dtypes(self, dtype, n_rows) -> None:
        model = tiny("llama", dtype=dtype)
        rules = selectors(model)
        found, runtime = wrapped(model, rules, n_rows=n_rows, break_even=1.0)
        expected, _ = wrapped(model, rules, n_rows=n_rows, break_even=0.0)
        assert set(runtime.levels.values()) == {"module"}
        limit = 1e-10 if dtype == torch.float64 else 0.1
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=limit, rtol=limit)

    def test_torch_is_told(self) -> None:
        model = tiny("llama", dtype=torch.float64)
        text = (
            r"rows are copied by torch in LlamaForCausalLM: model.layers.\* \(2 times\): its weights are torch.float64"
        )
        with pytest.warns(UserWarning, match=text.replace(r"\*", r"\*.mlp")):
            wrap_(model, selectors(model))

    @pytest.mark.parametrize(("name", "why"), [("bitnet", "a norm before down"), ("zamba2", "adapters of its uses")])
    def test_masked(self, name, why) -> None:
        model = tiny_causal_lm(name)
        sites = find_sites(model)
        kept = torch.arange(sites[0].d_ff) % 3 > 0
        gone = (~kept).nonzero().flatten()
        ids = tokens(1, 6)
        with replaced(model, {s: (gone, torch.zeros(len(gone))) for s in sites}):
            expected = logits(model, ids)
        dense = logits(model, ids)
        with pytest.warns(UserWarning, match=f"dense under the mask in .*: {why}"):
            runtime = wrap_(model, dict.fromkeys(sites, keep(kept)), prefill=True)
        assert set(runtime.levels.values()) == {"masked"} and runtime.copied_bytes == 0
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(unwrap_(model), ids), dense)

    def test_a_width_in_the_code(self) -> None:
        model = tiny("phi3")
        for layer in model.model.layers:
            layer.mlp.forward = halves_of_48.__get__(layer.mlp)
            layer.mlp.extra = torch.nn.Parameter(torch.zeros(1))  # so that it is not tried as a whole
        rules = selectors(model)
        with pytest.warns(UserWarning, match=r"model.layers.\*.mlp \(2 times\): its code names its width"):
            found, runtime = wrapped(model, rules)
        assert set(runtime.levels.values()) == {"masked"}
        expected, _ = wrapped(tiny("phi3"), rules, break_even=0.0)
        torch.testing.assert_close(found, expected)

    def test_another_activation_than_the_config_tells(self) -> None:
        model = tiny("llama")
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Tanh()
        rules = selectors(model)
        found, runtime = wrapped(model, rules, break_even=1.0)
        assert set(runtime.levels.values()) == {"projections"}
        expected, _ = wrapped(model, rules, break_even=0.0)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("dispatch", ["index", "sorted"])
    def test_experts_in_a_list(self, dispatch) -> None:
        model = tiny_listed(dispatch)
        rules, ids = selectors(model, 0.4), tokens(3, 1)
        results, dense = [], logits(model, ids)
        for limit in (0.0, 1.0):
            runtime = wrap_(model, rules, break_even=limit)
            results.append(logits(model, ids))
            assert set(runtime.levels.values()) == {"module"} and len(runtime.levels) == len(find_sites(model))
            unwrap_(model)
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(results[0], dense, atol=1e-3)
        assert torch.equal(logits(model, ids), dense)
        assert sum(row.tokens for row in runtime.measured().values()) == 3 * TOP_K * 2  # of both layers

    @pytest.mark.filterwarnings("ignore:dense under the mask in")
    def test_an_expert_that_cannot_be_tried(self) -> None:
        model = tiny_listed("index")
        levels = []
        for site, rule in selectors(model).items():
            levels.append(wrap_(model, {site: rule}).levels[site])
            unwrap_(model)
        assert levels.count("module") == TOP_K * 2 and levels.count("masked") == len(levels) - TOP_K * 2 > 0

    @pytest.mark.parametrize("arch", MIXTURES)
    def test_experts_that_share_parameters(self, arch) -> None:
        """One removed set of channels for every token gives what a replacement by zeros gives, and all goes back."""
        model, ids = tiny_moe(arch), tokens(2, 6)
        sites = [s for s in find_sites(model) if s.stacked]
        kept = {s: torch.rand(s.d_ff, generator=torch.Generator().manual_seed(i)) < 0.6 for i, s in enumerate(sites)}
        gone = {s: (~mask).nonzero().flatten() for s, mask in kept.items()}
        with replaced(model, {s: (index, torch.zeros(len(index))) for s, index in gone.items()}):
            expected = logits(model, ids)
        dense = logits(model, ids)
        with pytest.warns(UserWarning, match="dense under the mask in .*experts that share parameters have no module"):
            runtime = wrap_(model, {s: keep(mask) for s, mask in kept.items()}, prefill=True)
        assert set(runtime.levels.values()) == {"masked"}
        assert torch.equal(logits(model, ids), expected) and not torch.equal(dense, expected)
        assert torch.equal(logits(unwrap_(model), ids), dense)
        assert all("forward" not in vars(model.get_submodule(s.path)) for s in sites)

    @pytest.mark.filterwarnings("ignore:dense under the mask in")
    def test_each_token_of_experts_that_share_parameters_has_its_own_channels(self) -> None:
        """A batch of decoding steps gives each sequence what it gets alone, and prompts run dense."""
        model, ids = tiny_moe("mixtral"), tokens(3, 1)
        rules = {s: rule for s, rule in selectors(model, 0.4).items() if s.stacked}
        dense = logits(model, tokens(2, 5))
        runtime = wrap_(model, rules)
        together, alone = logits(model, ids), torch.cat([logits(model, one[None]) for one in ids])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
        assert torch.equal(logits(model, tokens(2, 5)), dense)
        n_layers, top_k = len({s.layer for s in rules}), model.config.num_experts_per_tok
        assert sum(row.tokens for row in runtime.measured().values()) == 2 * 3 * n_layers * top_k
        unwrap_(model)
        assert not torch.allclose(logits(model, ids), together, atol=1e-4)


def halves_of_48(self, x):
    both = self.gate_up_proj(x)
    gate, up = both.split(48, dim=-1)
    return self.down_proj(self.activation_fn(gate) * up)


class TestDecoding:
    def test_generate(self, llama) -> None:
        rules, ids = selectors(llama), tokens(2, 6)
        settings = {
            "max_new_tokens": 5,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
            "eos_token_id": None,
        }
        dense = llama.generate(ids, **settings)
        results = []
        for limit in (0.0, 1.0, None):
            runtime = wrap_(llama, rules, break_even=limit)
            results.append(llama.generate(ids, **settings))
            assert all(row.tokens == 8 for row in runtime.measured().values())  # the first token is from the prompt
            unwrap_(llama)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert not torch.equal(results[0], dense)
        assert torch.equal(llama.generate(ids, **settings), dense)

    @pytest.mark.parametrize("beams", [1, 3, 20])  # 20 beams of 3 prompts are more tokens than rows are read for
    def test_prompts_of_different_lengths(self, llama, beams) -> None:
        """Padded on the left: beams choose what they choose under the mask, and greedy rows what they are alone."""
        rules, ids = selectors(llama), tokens(3, 7)
        padded = torch.ones_like(ids)
        padded[0, :4] = padded[1, :2] = 0
        settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        results = []
        for limit in (0.0, None if beams == 20 else 1.0):
            wrap_(llama, rules, break_even=limit)
            results.append(llama.generate(ids, attention_mask=padded, **settings))
            alone = [
                llama.generate(ids[i : i + 1, start:], attention_mask=padded[i : i + 1, start:], **settings)
                for i, start in enumerate((4, 2, 0))
            ]
            unwrap_(llama)
            for i, start in enumerate((4, 2, 0)):
                assert torch.equal(results[-1][i, start:], alone[i][0])
        assert torch.equal(*results)

    def test_some_sites(self, llama) -> None:
        first = dict(list(selectors(llama).items())[:1])
        found, runtime = wrapped(llama, first, break_even=1.0)
        assert list(runtime.measured()) == list(first)
        assert not torch.allclose(found[1:], decode(llama)[1:])

    def test_more_tokens_than_rows_pay_for(self, llama, monkeypatch) -> None:
        monkeypatch.setattr(module, "MOST_TOKENS", 2)
        monkeypatch.setattr(module, "reading_times", lambda *args: RowTimes((0.0,) * len(DENSITIES)))
        for n_rows, share in ((2, 1.0), (3, 0.0)):
            _, runtime = wrapped(llama, selectors(llama), n_rows=n_rows)
            assert {row.sparse_steps for row in runtime.measured().values()} == {share}

    def test_all_channels(self, llama) -> None:
        """A selection of everything leaves h as it is; a union of everything is none."""
        down, seen = llama.model.layers[0].mlp.down_proj, []
        for n_rows, rule, same in (
            (1, keep(torch.ones(D_FF, dtype=torch.bool)), True),
            (2, lambda x: (torch.arange(D_FF) + torch.arange(len(x))[:, None]) % 2 > 0, False),
        ):
            runtime = wrap_(llama, dict.fromkeys(find_sites(llama), rule), break_even=0.0)
            first = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
            last = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            with torch.no_grad():
                llama(input_ids=tokens(n_rows, 1), use_cache=False)
            for handle in (first, last):
                handle.remove()
            unwrap_(llama)
            before, after = seen[-2:]
            assert (after is before) == same
            assert {row.union for row in runtime.measured().values()} == {1.0}
            assert same or ((after == 0).sum(-1) == D_FF // 2).all()

    def test_gradients_take_the_dense_path(self, llama) -> None:
        ids = tokens(1, 1)
        runtime = wrap_(llama, selectors(llama), break_even=1.0)
        llama(input_ids=ids, use_cache=False).logits.sum().backward()
        assert runtime.measured() == {}  # no decoding
        grad = llama.model.layers[0].mlp.up_proj.weight.grad
        assert 0 < int((grad != 0).any(-1).sum()) <= round(0.3 * D_FF)

    def test_interrupted_in_the_middle(self, llama) -> None:
        rules, calls = selectors(llama), []

        def fails(x):
            calls.append(x)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return first(x)

        site, first = next(iter(rules.items()))
        expected, _ = wrapped(llama, rules, break_even=1.0)
        wrap_(llama, {**rules, site: fails}, break_even=1.0)
        with pytest.raises(KeyboardInterrupt):
            decode(llama)
        torch.testing.assert_close(decode(llama), expected)


class TestRefusals:
    def test_texts(self, llama) -> None:
        rules = selectors(llama)
        site = next(iter(rules))
        with pytest.raises(UsageError, match="no selectors were given; expected one per FFN"):
            wrap_(llama, {})
        with pytest.raises(UsageError, match=r"break_even must be a density in \[0, 1\]; got 30"):
            wrap_(llama, rules, break_even=30)
        with pytest.raises(UsageError, match=r"has 48 channels of width 32; this model has \(24, 32\) there"):
            wrap_(tiny("llama", intermediate_size=24), rules)
        with pytest.raises(UsageError, match="is not wrapped"):
            unwrap_(llama)
        wrap_(llama, rules)
        with pytest.raises(UsageError, match=r"is wrapped already; call unwrap_\(model\) first"):
            wrap_(llama, rules)
        unwrap_(llama)
        wrap_(llama, {site: lambda x: torch.ones(1, 3)})
        with pytest.raises(
            UsageError, match=r"gave torch.float32 \(1, 3\); expected torch.bool \(1, 48\) = \(T, d_ff\)"
        ):
            decode(llama)

    def test_what_is_no_selector(self, llama) -> None:
        rules = selectors(llama)
        site = next(iter(rules))
        for given, message in (
            ("card.json", r"must be a card, as read_card reads it, or \{site: function\}; got str"),
            (list(rules), r"got list"),
            ({site.path: rules[site]}, r"sites as find_sites gives them; got the key 'model.layers.0.mlp'"),
            ({site: torch.ones(D_FF) > 0}, r"is a Tensor; expected a function of x \[T, d_model\]"),
        ):
            with pytest.raises(UsageError, match=message):
                wrap_(llama, given)
        ahead = Selector(fixed.random(ffn_of(llama, site)), TopK(), 3)
        ahead.predictor.lookahead = 1
        with pytest.raises(NotAvailableError, match="looks ahead from the FFN one layer before"):
            wrap_(llama, {site: ahead})
        with pytest.raises(UsageError, match="monitor needs the bands of a card"):
            wrap_(llama, rules, monitor=MonitorOptions())

    def test_nan(self, llama) -> None:
        with torch.no_grad():
            llama.model.layers[0].mlp.up_proj.weight[3, 2] = float("nan")
        with pytest.raises(NonFiniteError, match=r"model.layers.0.mlp puts out NaN or infinity for one token"):
            wrap_(llama, selectors(llama))
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in llama.modules())

    def test_offloaded(self, llama) -> None:
        rules = selectors(llama)
        with pytest.raises(ModelError, match=r"offloaded|has no value|meta device"):
            wrap_(llama.to("meta"), rules)

    def test_a_failed_wrap_leaves_nothing(self, llama, monkeypatch) -> None:
        monkeypatch.setattr(module, "differs", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wrap_(llama, selectors(llama))
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in llama.modules())


def test_unwrapping_gives_the_rows_back_at_once(llama, monkeypatch) -> None:
    seen = []

    def of(weights):
        made = RowWeights.of(weights)
        seen.append(weakref.ref(made.down.weight))
        return made

    monkeypatch.setattr(module, "RowWeights", SimpleNamespace(of=of))
    gc.collect()
    gc.disable()
    try:
        _, runtime = wrapped(llama, selectors(llama), break_even=1.0)
        alive = [row() is not None for row in seen]
    finally:
        gc.enable()
    assert alive and not any(alive)
    assert runtime.copied_bytes > 0  # what was told stays


def test_break_even_is_measured_once_per_shape(llama, monkeypatch) -> None:
    asked = []

    def measure(shape, d_ff, forms, device):
        asked.append((shape, len(forms.dense)))
        for run, under, some in zip(forms.dense, forms.masked, forms.sparse, strict=True):
            run()
            under()
            some(torch.arange(3, dtype=torch.int32))
        return RowTimes(tuple(1.94 * density for density in DENSITIES))

    monkeypatch.setattr(timing, "row_times", measure)
    _, runtime = wrapped(llama, selectors(llama))
    assert {(shape[2], n) for shape, n in asked} == {(1, 2)}  # one token; two layers take turns
    assert len(asked) == 2  # not at every step
    assert {row.sparse_steps for row in runtime.measured().values()} == {1.0}
    _, runtime = wrapped(llama, selectors(llama, 0.6))  # above the 0.5 where that line crosses
    assert {row.sparse_steps for row in runtime.measured().values()} == {0.0}
