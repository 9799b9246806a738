"""Contracts of the extension points, for ffnscope's own rules and for yours.

A test of your package that calls ``check_metric("my_metric")``, ``check_allocator("my_allocator")`` or
``check_predictor("my_predictor")`` shows that it can be used wherever a built-in one can. ``check_runtime(my_ffn)``
does so for a kernel that reads selected channels.
"""

from ffnscope.testing.allocators import check_allocator
from ffnscope.testing.metrics import check_metric
from ffnscope.testing.predictors import check_predictor
from ffnscope.testing.runtimes import check_runtime

__all__ = ["check_allocator", "check_metric", "check_predictor", "check_runtime"]
