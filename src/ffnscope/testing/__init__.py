"""Contracts of the extension points, for ffnscope's own rules and for yours.

A test of your package that calls ``check_metric("my_metric")``, ``check_allocator("my_allocator")`` or
``check_predictor("my_predictor")`` shows that it can be used wherever a built-in one can.
"""

from ffnscope.testing.allocators import check_allocator
from ffnscope.testing.metrics import check_metric
from ffnscope.testing.predictors import check_predictor

__all__ = ["check_allocator", "check_metric", "check_predictor"]
