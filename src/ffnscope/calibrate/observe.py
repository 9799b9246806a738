"""One observed batch: forward, and backward where gradients are wanted, with taps on the channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ffnscope.calibrate.forward import forward_logits, memory_errors
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.taps import OnActivation, OnGradient, OnRouting, SignalTap, channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, NotAvailableError
from ffnscope.types import FFNSite


def observe_batch(
    model: nn.Module,
    sites: Sequence[FFNSite],
    batch: Windows,
    on_activation: OnActivation | None,
    on_gradient: OnGradient | None = None,
    signal_tap: SignalTap | None = None,
    on_routing: OnRouting | None = None,
) -> None:
    """Run one batch; call back with h, and with h and g = d(summed token NLL) / dh when ``on_gradient`` is given.

    ``on_routing`` is told the tokens of an expert before its h comes (see `channel_taps`).

    The model must be `frozen`. Without ``on_gradient`` there is no backward, and the forward runs under
    ``inference_mode``.

    Raises:
        DeviceError: out of memory; the key to lower is named.
        NotAvailableError: the code of the model lets no gradient through.
    """
    key = "calibration.batch_size" if on_gradient is None else "metrics.scar.max_length or calibration.batch_size"
    size = f"{len(batch)} windows of {batch.length} tokens"
    with memory_errors(f"out of memory in the calibration pass ({size}). Lower {key}."):
        if on_gradient is None:
            with torch.inference_mode(), channel_taps(model, sites, on_activation, None, signal_tap, on_routing):
                forward_logits(model, batch)
        else:
            taps = channel_taps(model, sites, on_activation, on_gradient, signal_tap, on_routing)
            with torch.inference_mode(False), torch.enable_grad(), taps:
                loss = sum_nll(forward_logits(model, batch), batch)
                if not loss.requires_grad:
                    raise no_gradient(model)
                loss.backward()


def no_gradient(model: nn.Module) -> NotAvailableError:
    """Build the error for a model whose code lets no gradient through."""
    return NotAvailableError(
        f"the code of {type(model).__name__} computes without gradients outside of training, so metrics that need "
        "gradients cannot rank its channels. Choose one that needs none, such as wanda (`ffnscope metrics` tells)."
    )


def sum_nll(logits: Tensor, batch: Windows) -> Tensor:
    """Sum of the negative log-likelihood (nats) of all target tokens of a batch; logits [batch, T, vocab]."""
    targets = batch.targets[:, 1:].to(logits.device)
    picked = logits[:, :-1][targets]
    labels = batch.input_ids[:, 1:].to(logits.device)[targets]
    dtype = torch.promote_types(picked.dtype, torch.float32)
    return nn.functional.cross_entropy(picked.to(dtype), labels, reduction="sum")


def not_finite(model: nn.Module, sites: Sequence[FFNSite], batch: Windows, gradient: FFNSite) -> NonFiniteError:
    """Build the error for a batch that gave NaN or infinity, naming where it began.

    A NaN spreads: from an activation to every later site, and through the loss to the gradient of every site. So the
    batch is run once more, and the first site whose activation is not finite is named; when all activations are
    finite, it is what the FFN ``gradient`` put out, or a gradient there.
    """
    bad: list[FFNSite] = []
    rows = TokenRows(batch.valid)

    def look(site: FFNSite, h: Tensor) -> None:
        if not bad and not bool(torch.isfinite(rows.take(site, h)).all()):
            bad.append(site)

    observe_batch(model, sites, batch, look, on_routing=rows.route)
    return overflow("a channel activation", bad[0]) if bad else overflow("an output or a gradient", gradient)


def overflow(what: str, site: FFNSite) -> NonFiniteError:
    """Build the error for something of a site that is NaN or infinite."""
    return NonFiniteError(
        f"{what} of {site.name} is NaN or infinite. In float16 this is usually an overflow: load the model "
        "in bfloat16 or float32 (model.dtype); otherwise look for NaN in the checkpoint."
    )
