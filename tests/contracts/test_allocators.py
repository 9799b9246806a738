"""Every registered allocator keeps the laws of allocators: a new one is tested by being registered."""

from __future__ import annotations

import pytest

from ffnscope.registry import ALLOCATORS
from ffnscope.testing import check_allocator


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_allocator_keeps_the_laws(name):
    check_allocator(name)


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_allocator_is_documented(name):
    assert ALLOCATORS.get(name).summary
