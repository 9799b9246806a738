"""Contracts of the extension points, for ffnscope's own rules and for yours.

A test of your package that calls ``check_metric("my_metric")`` or ``check_allocator("my_allocator")`` shows that it
can be used wherever a built-in one can.
"""

from ffnscope.testing.allocators import check_allocator
from ffnscope.testing.metrics import check_metric

__all__ = ["check_allocator", "check_metric"]
