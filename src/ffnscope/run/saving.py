"""The formats in which pruned models are saved, and what each of them refuses before the work begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from ffnscope.apply.decilm import check_llama_like, save_decilm
from ffnscope.apply.export import SHARD, check_shard_size, prune_, save_model
from ffnscope.apply.folder import staged
from ffnscope.apply.gguf_file import check_gguf, check_one_width, save_gguf
from ffnscope.apply.padding import zeroed_channels
from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.apply.reconstruction import Reconstruction, reconstruct_
from ffnscope.apply.write_pruned import Destination, write_pruned
from ffnscope.apply.written_blocks import STATE
from ffnscope.calibrate.blocks import list_of_blocks
from ffnscope.errors import NotAvailableError, unknown_name
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.narrowed import MODELING
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.streamed import is_streamed
from ffnscope.io import read_state
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import discard_damaged
from ffnscope.types import EvalResult, PruningPlan

Form = Literal["transformers", "decilm", "gguf"]
UNEVEN = ("halfway", "global", "standardised", "outliers", "measured")
FORMATS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, slots=True)
class Saving:
    """Where and in which format a pruned model goes.

    Attributes:
        out: folder, or file of the format "gguf".
        form: one of `FORMATS`.
        pad_to_widest: see `prune_`.
        max_shard_size: largest file of weights.
        overwrite: replace what is there.
        by_blocks: write block by block and leave the model as it is, as always where it is streamed; see `can_leave`.
        unfinished: folder for finished blocks of a model that is written so, from which the same call goes on.
        model_hash: of the dense weights, where it is known.

    Raises:
        UsageError: no such format, or not a size of shards.
    """

    out: Path
    form: str = "transformers"
    pad_to_widest: bool = False
    max_shard_size: str = SHARD
    overwrite: bool = False
    by_blocks: bool = False
    unfinished: Path | None = None
    model_hash: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMATS:
            raise unknown_name("format", self.form, FORMATS)
        check_shard_size(self.max_shard_size)

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise NotAvailableError when the format cannot hold a model of this family, or its tokenizer."""
        if self.form == "decilm":
            check_llama_like(loaded.model, self.form)
        elif self.form == "gguf":
            check_gguf(loaded.model, loaded.tokenizer)

    def check_plan(self, loaded: LoadedModel, plan: PruningPlan, reporter: Reporter) -> None:
        """Raise NotAvailableError when the format cannot hold a plan's widths; say so when padding does nothing."""
        planned = {site.name for site in plan.kept}
        rest = {site.d_ff for site in find_sites(loaded.model) if site.name not in planned}
        widths = rest | set(plan.widths.values())
        if self.pad_to_widest and len(widths) == 1:
            reporter.say("note: padding changes nothing here; every FFN keeps the same number of channels.")
        if self.form == "gguf" and not self.pad_to_widest:
            check_one_width(widths)

    def check_allocator(self, allocator: str) -> None:
        """Raise NotAvailableError when an allocator gives widths that the format cannot hold, before any work."""
        if self.form == "gguf" and not self.pad_to_widest and allocator in UNEVEN:
            raise NotAvailableError(
                f"the format 'gguf' has one width for all FFNs, and the allocator {allocator!r} gives them different "
                "ones. Choose the allocator 'local', or pad to the widest (--pad-to-widest)."
            )

    def can_leave(self, model: nn.Module, pruned: Pruned) -> bool:
        """Whether a checkpoint can be written block by block: see `write_pruned`."""
        if self.form != "transformers" or (isinstance(pruned, Reconstruction) and pruned.bias):
            return False
        try:
            list_of_blocks(model, list(plan_of(pruned).kept))
        except NotAvailableError:
            return False
        return True

    def prune_and_save(
        self,
        loaded: LoadedModel,
        pruned: Pruned,
        results: Mapping[str, Sequence[EvalResult]],
        reporter: Reporter,
        add: Callable[[Path], None] | None = None,
    ) -> None:
        """Slice the model, reconstructed or not, save it, and say what is gone and how the result loads.

        ``add`` writes more into the checkpoint; it appears with all that, or not at all.
        """
        model, tokenizer = loaded.model, loaded.tokenizer
        if self.by_blocks or (is_streamed(model) and self.form == "transformers"):
            self._write_blocks(loaded, pruned, results, reporter, add)
            return
        before = sum(p.numel() for p in model.parameters())
        plan = pruned.told_plan if isinstance(pruned, Reconstruction) else pruned
        if isinstance(pruned, Reconstruction):
            reconstruct_(model, pruned, pad_to_widest=self.pad_to_widest)
        else:
            prune_(model, plan, pad_to_widest=self.pad_to_widest)
        after = sum(p.numel() for p in model.parameters())
        with staged(self.out, self.overwrite) as out:
            if self.form == "gguf":
                save_gguf(model, tokenizer, out)
            else:
                save = save_decilm if self.form == "decilm" else save_model
                save(model, tokenizer, out, plan=plan, results=results, max_shard_size=self.max_shard_size)
            if add is not None:
                add(out)
        self._tell(reporter, before, after, plan, zeroed_channels(model, plan))

    def _write_blocks(
        self,
        loaded: LoadedModel,
        pruned: Pruned,
        results: Mapping[str, Sequence[EvalResult]],
        reporter: Reporter,
        add: Callable[[Path], None] | None,
    ) -> None:
        """The same for a model that is not cut: what is left of each block is written."""
        plan = pruned.told_plan if isinstance(pruned, Reconstruction) else pruned
        before = sum(p.numel() for p in loaded.model.parameters())
        if self.unfinished is not None:
            discard_damaged(reporter, self.unfinished / STATE, read_state)
        with staged(self.out, self.overwrite) as out:
            kept = self.unfinished, self.model_hash
            output = Destination(out, self.max_shard_size, self.pad_to_widest, False, *kept)
            after, zeroed = write_pruned(loaded.model, loaded.tokenizer, output, pruned, results)
            if add is not None:
                add(out)
        self._tell(reporter, before, after, plan, zeroed)

    def _tell(self, reporter: Reporter, before: int, after: int, plan: PruningPlan, zeroed: int) -> None:
        reporter.say(f"{before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer), saved in {self.out}")
        reporter.say(_achieved(plan, zeroed))
        if (self.out / MODELING.name).exists():
            reporter.say(
                "widths differ: load it with ffnscope, or in transformers with trust_remote_code=True; the allocator "
                "local gives a checkpoint that plain transformers loads"
            )


def _achieved(plan: PruningPlan, zeroed: int) -> str:
    step = plan.budget.multiple_of
    why = f"; widths are multiples of {step}" if step > 1 else ""
    still = f"; {zeroed:,} of them are zeros that are still in the files" if zeroed else ""
    return f"removed {plan.sparsity:.4f} of the FFN channels (asked {plan.budget.sparsity:g}{why}){still}"
