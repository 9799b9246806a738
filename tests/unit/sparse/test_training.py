"""Trained predictors: losses by hand, early stopping, resume, files of other tools."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from faults import stop_at
from ffnscope.errors import ArtifactError, NonFiniteError, UnknownNameError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.sparse.labels import largest
from ffnscope.sparse.measures import measure
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors.fc_files import read_fc_predictors, write_fc_predictors
from ffnscope.sparse.predictors.fixed import static
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.predictors.low_rank import LowRank, low_rank
from ffnscope.sparse.predictors.training import TrainingOptions, mass_loss, published_loss, train_low_rank
from ffnscope.types import FFNWeights

D_MODEL, D_FF, RANK = 8, 32, 8


def ffn(dtype: torch.dtype = torch.float32) -> FFN:
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(D_FF, D_MODEL, generator=random).to(dtype) for _ in range(2))
    return FFN(FFNWeights(gate, up, torch.randn(D_MODEL, D_FF, generator=random).to(dtype)), nn.functional.relu)


def tokens(n: int = 512, seed: int = 3, dtype: torch.dtype = torch.float32) -> FitTokens:
    x = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return FitTokens(x, torch.arange(n) // 32)


def quick(**changes: object) -> TrainingOptions:
    return TrainingOptions(**{"epochs": 6, "batch_size": 64, "learning_rate": 1e-2, **changes})  # type: ignore[arg-type]


def new(one: FFN | None = None, *, relu: bool = True, lookahead: int = 0) -> LowRank:
    return LowRank(one or ffn(), RANK, relu=relu, lookahead=lookahead)


class TestLosses:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    labels = torch.tensor([[True, False, True, False]])
    c = torch.tensor([[3.0, 9.0, 1.0, 0.0]])

    def entropy(self) -> list[float]:
        return [math.log(2), math.log(1 + math.e), math.log(1 + math.e), math.log(1 + math.e**2)]

    def test_positives_weigh_their_share_of_the_mass(self) -> None:
        each = self.entropy()
        expected = (1.5 * each[0] + each[1] + 0.5 * each[2] + each[3]) / 4
        assert float(mass_loss(self.logits, self.labels, self.c)) == pytest.approx(expected)

    def test_published(self) -> None:
        each = self.entropy()
        expected = (each[0] + each[2] + 0.505 * (each[1] + each[3])) / 4
        assert float(published_loss(self.logits, self.labels, self.c)) == pytest.approx(expected)

    def test_a_token_without_positives(self) -> None:
        none = torch.zeros(1, 4, dtype=torch.bool)
        assert float(mass_loss(torch.zeros(1, 4), none, self.c)) == pytest.approx(math.log(2))

    def test_the_published_cut_is_at_the_base_rate(self) -> None:
        """With a posterior pi the optimum is at logit 0 where pi = w / (1 + w), not at one half."""
        labels = (torch.arange(1000) < 100)[:, None]
        logit = torch.zeros(1, requires_grad=True)
        published_loss(logit.expand(1000, 1), labels, labels.float()).backward()
        base = 0.105
        at_cut = base / (1 + base)
        assert logit.grad is not None
        assert float(logit.grad) == pytest.approx(0.5 * (0.9 * base - 0.1), rel=1e-4)
        assert at_cut == pytest.approx(0.095, abs=1e-3)


class TestTraining:
    @pytest.mark.parametrize("relu", [True, False])
    @pytest.mark.parametrize("loss", ["mass", "published"])
    def test_it_learns_what_a_constant_cannot_know(self, loss: str, relu: bool) -> None:
        one, fit, other = ffn(), tokens(), tokens(seed=9).x
        found = train_low_rank(new(relu=relu), fit, quick(loss=loss))
        assert found.missed_mass[found.best_epoch] == min(found.missed_mass)

        def missed(predictor: nn.Module) -> float:
            def select(x: Tensor) -> Tensor:
                return TopK().select(predictor(x), round(0.3 * D_FF))

            return measure(one, select, other, lambda c: largest(c, 0.3)).summary()["missed_mass"].mean

        assert missed(found.predictor) < 0.8 * missed(static(one, fit))

    def test_same_arguments_same_result(self) -> None:
        torch.manual_seed(1)
        first = train_low_rank(new(), tokens(), quick())
        torch.manual_seed(2)
        again = train_low_rank(new(), tokens(), quick())
        assert first.missed_mass == again.missed_mass
        for name, value in first.predictor.state_dict().items():
            assert torch.equal(value, again.predictor.state_dict()[name])

    def test_it_ends_when_nothing_gets_better(self) -> None:
        epochs: list[int] = []
        found = train_low_rank(
            new(),
            tokens(),
            quick(epochs=50, patience=2, learning_rate=1.0),
            on_epoch=lambda done, *rest: epochs.append(done),
        )
        assert len(found.missed_mass) == found.best_epoch + 3 == len(epochs) + 1
        assert len(epochs) < 50

    def test_the_best_epoch_is_kept(self) -> None:
        found = train_low_rank(new(), tokens(), quick(epochs=8, learning_rate=0.3))
        again = train_low_rank(new(), tokens(), quick(epochs=max(found.best_epoch, 1), learning_rate=0.3))
        if found.best_epoch:
            assert torch.equal(found.predictor.fc2.weight, again.predictor.fc2.weight)

    def test_lookahead_reads_the_earlier_input(self) -> None:
        fit = tokens()
        same = FitTokens(fit.x, fit.document, fit.x)
        found = train_low_rank(new(lookahead=1), same, quick())
        assert found.predictor.lookahead == 1
        assert found.missed_mass == train_low_rank(new(), fit, quick()).missed_mass
        noise = FitTokens(fit.x, fit.document, torch.randn(fit.x.shape, generator=torch.Generator().manual_seed(5)))
        assert train_low_rank(new(lookahead=1), noise, quick()).missed_mass[-1] > found.missed_mass[-1]
        with pytest.raises(UsageError, match="earlier"):
            train_low_rank(new(lookahead=1), fit, quick())

    def test_the_dtype_of_the_weights(self) -> None:
        one = ffn(torch.bfloat16)
        made = low_rank(one, tokens(dtype=torch.bfloat16), rank=RANK, epochs=1)
        assert made.bytes_read == RANK * (D_MODEL + D_FF) * 2
        assert made(tokens(5, dtype=torch.bfloat16).x).dtype == torch.float32

    def test_without_documents_the_last_tokens_judge(self) -> None:
        assert len(train_low_rank(new(), FitTokens(tokens().x), quick(epochs=1)).missed_mass) == 2
        with pytest.raises(UsageError, match="judge"):
            train_low_rank(new(), FitTokens(tokens().x[:1]), quick())

    def test_what_is_not_finite(self) -> None:
        with pytest.raises(NonFiniteError, match=r"logits .* lower the learning rate|a score is NaN"):
            train_low_rank(new(), tokens(), quick(learning_rate=1e30))
        fit = tokens()
        fit.x[7] = math.nan  # not among the last, which judge
        with pytest.raises(NonFiniteError, match=r"contributions of the FFN, epoch 1 .*traces"):
            train_low_rank(new(), FitTokens(fit.x), quick())

    def test_impossible_options(self) -> None:
        with pytest.raises(UnknownNameError, match="published"):
            quick(loss="bce")
        for bad in ({"density": 1.0}, {"epochs": 0}, {"patience": 0}, {"learning_rate": 0.0}):
            with pytest.raises(UsageError):
                quick(**bad)
        with pytest.raises(UsageError, match="lookahead 0 or 1"):
            new(lookahead=2)


class TestResume:
    def test_equals_the_unbroken_run(self, tmp_path: Path) -> None:
        class Cut(BaseException):
            pass

        def cut(done: int, total: int, missed: float) -> None:
            if done == 3:
                raise Cut

        whole = train_low_rank(new(), tokens(), quick())
        path = tmp_path / "training.safetensors"
        with pytest.raises(Cut):
            train_low_rank(new(), tokens(), quick(), checkpoint=path, on_epoch=cut)
        epochs: list[int] = []
        found = train_low_rank(
            new(), tokens(), quick(), checkpoint=path, on_epoch=lambda done, *rest: epochs.append(done)
        )
        assert epochs == [4, 5, 6]
        assert found.missed_mass == whole.missed_mass
        for name, value in whole.predictor.state_dict().items():
            assert torch.equal(value, found.predictor.state_dict()[name])

    def test_other_arguments_begin_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "training.safetensors"
        train_low_rank(new(), tokens(), quick(epochs=2), checkpoint=path)
        for fit, options in ((tokens(seed=4), quick(epochs=2)), (tokens(), quick(epochs=2, seed=1))):
            epochs: list[int] = []
            train_low_rank(new(), fit, options, checkpoint=path, on_epoch=lambda done, *rest, e=epochs: e.append(done))
            assert epochs == [1, 2]

    def test_a_damaged_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "training.safetensors"
        path.write_bytes(b"nothing")
        with pytest.raises(ArtifactError, match="trained again"):
            train_low_rank(new(), tokens(), quick(), checkpoint=path)


class TestFilesOfOtherTools:
    def trained(self, *, relu: bool = True) -> list[LowRank]:
        return [train_low_rank(new(relu=relu), tokens(seed=s), quick(epochs=1)).predictor for s in (1, 2)]

    def test_round_trip(self, tmp_path: Path) -> None:
        made = self.trained()
        write_fc_predictors(tmp_path / "predictors", made)
        state = torch.load(tmp_path / "predictors" / "model_1.pt", weights_only=True)
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "fc1.weight": (RANK, D_MODEL),
            "fc2.weight": (D_FF, RANK),
        }
        found = read_fc_predictors(tmp_path / "predictors", [ffn(), ffn()])
        x = tokens(20).x
        assert all(torch.equal(a(x), b(x)) for a, b in zip(made, found, strict=True))

    def test_before_the_norm_the_selection_is_the_same(self, tmp_path: Path) -> None:
        made = self.trained()
        norms = [torch.linspace(0.2, 2, D_MODEL), torch.linspace(-1, -3, D_MODEL)]
        write_fc_predictors(tmp_path / "p", made, norms)
        stream = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1)) * 30
        for layer, one in enumerate(made):
            state = torch.load(tmp_path / "p" / f"model_{layer}.pt", weights_only=True)
            theirs = (stream @ state["fc1.weight"].T).relu() @ state["fc2.weight"].T
            ours = one.logits(nn.functional.rms_norm(stream, (D_MODEL,), norms[layer]))
            clear = ours.abs() > 1e-4 * ours.abs().max()
            assert torch.equal((theirs >= 0)[clear], (ours >= 0)[clear])
        back = read_fc_predictors(tmp_path / "p", [ffn(), ffn()], norms)
        assert all(torch.allclose(a.fc1.weight, b.fc1.weight) for a, b in zip(made, back, strict=True))

    def test_a_bias_and_no_relu_are_read(self, tmp_path: Path) -> None:
        random = torch.Generator().manual_seed(0)
        first, second, bias = (torch.randn(*s, generator=random) for s in ((3, D_MODEL), (D_FF, 3), (D_FF,)))
        torch.save({"fc1.weight": first, "fc2.weight": second, "fc2.bias": bias}, tmp_path / "model_0.pt")
        x = tokens(10).x
        (found,) = read_fc_predictors(tmp_path, [ffn()], relu=False)
        assert torch.allclose(found.logits(x), x @ first.T @ second.T + bias, atol=1e-5)

    @pytest.mark.parametrize("there", [True, False])
    def test_a_folder_has_all_files_or_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
        """Cut off at the second file, the same call again is not refused."""
        made, out = self.trained(), tmp_path / "p"
        if there:
            out.mkdir()
        with monkeypatch.context() as patch:
            stop_at(patch, torch, "save", 2)
            with pytest.raises(KeyboardInterrupt):
                write_fc_predictors(out, made)
        assert list(tmp_path.iterdir()) == ([out] if there else [])
        assert list(tmp_path.rglob("*.pt")) == []
        write_fc_predictors(out, made)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["model_0.pt", "model_1.pt", "p"]

    def test_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        with pytest.raises(ArtifactError, match="is the current folder"):
            write_fc_predictors(Path(), self.trained())
        with pytest.raises(UsageError, match="no ReLU"):
            write_fc_predictors(tmp_path / "p", self.trained(relu=False))
        with pytest.raises(UsageError, match="a lookahead"):
            write_fc_predictors(tmp_path / "p", [new(lookahead=1)])
        with pytest.raises(UsageError, match="a norm for each"):
            write_fc_predictors(tmp_path / "p", self.trained(), [torch.ones(D_MODEL)])
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("x")
        with pytest.raises(ArtifactError, match="not empty"):
            write_fc_predictors(tmp_path / "mine", self.trained())
        with pytest.raises(ArtifactError, match="does not exist"):
            read_fc_predictors(tmp_path, [ffn()])
        (tmp_path / "model_0.pt").write_bytes(b"nothing")
        with pytest.raises(ArtifactError, match="damaged"):
            read_fc_predictors(tmp_path, [ffn()])
        torch.save({"fc1.weight": torch.ones(2, D_MODEL)}, tmp_path / "model_0.pt")
        with pytest.raises(ArtifactError, match=r"expected fc1\.weight and fc2\.weight"):
            read_fc_predictors(tmp_path, [ffn()])
        torch.save({"fc1.weight": torch.ones(2, 5), "fc2.weight": torch.ones(D_FF, 2)}, tmp_path / "model_0.pt")
        with pytest.raises(UsageError, match=r"needs \[rank, 8\]"):
            read_fc_predictors(tmp_path, [ffn()])
        with pytest.raises(UsageError, match="2 norms"):
            read_fc_predictors(tmp_path, [ffn()], [torch.ones(8)] * 2)
