"""A model as lm-eval wants it, which reports how many requests are done."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor


def reporting_model(model: Any, tokenizer: Any, batch_size: int, on_requests: Callable[[int, int], None] | None) -> Any:
    """Wrap a loaded model for lm-eval; its own progress bars are off.

    Requests that share a forward count once it has run; some need none of their own, and count at the end.
    """
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM

    class Reporting(base):
        _total = 0
        _done = 0

        def _tell(self, n: int) -> None:
            self._done = min(self._total, self._done + n)
            if on_requests is not None:
                on_requests(self._done, self._total)

        def _counted(self, n: int, run: Callable[[], Any]) -> Any:
            """Run ``n`` requests, all of which are done at the end."""
            self._total += n
            found = run()
            self._tell(self._total)
            return found

        def _ran(self, n: int) -> None:
            """Count a forward of ``n`` requests, but not as the last ones: some need no forward of their own."""
            if self._done + n < self._total:
                self._tell(n)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._counted(len(requests), partial(super().loglikelihood, requests, disable_tqdm=True))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._counted(len(requests), partial(super().loglikelihood_rolling, requests, disable_tqdm=True))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._counted(len(requests), partial(super().generate_until, requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            found = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
            self._ran(inps.shape[0])
            return found

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            self._ran(context.shape[0])
            return found

    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
