"""The page pool never leaks a page, never hands one out twice and never hands out the garbage page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.errors import CapacityError, ConfigError, ProtocolError
from seer_jax.core.kv.page_pool import PagePool, pages_for_tokens
from tests.core.fake_cluster import property_settings


@property_settings(max_examples=50)
@given(num_pages=st.integers(2, 40), actions=st.lists(st.tuples(st.booleans(), st.integers(0, 45)), max_size=60))
def test_pages_are_free_or_held_by_exactly_one_owner(num_pages, actions):
    pool = PagePool(num_pages, page_size=4)
    owners: list[list[int]] = []
    for wants_pages, number in actions:
        held = [page for pages in owners for page in pages]
        assert pool.num_free_pages == pool.num_total_pages - len(held)
        if not wants_pages:
            if owners:
                pool.free(owners.pop(number % len(owners)))
        elif number > pool.num_free_pages:
            with pytest.raises(CapacityError):
                pool.allocate(number)
        else:
            pages = pool.allocate(number)
            assert len(set(pages)) == number and not set(pages) & set(held)
            assert all(0 < page < num_pages for page in pages)
            owners.append(pages)
    for pages in owners:
        pool.free(pages)
    assert sorted(pool.allocate(pool.num_total_pages)) == list(range(1, num_pages))


def test_order_of_pages_is_fixed():
    pool = PagePool(6, page_size=4)
    assert pool.allocate(3) == [1, 2, 3]
    pool.free([2, 1])
    assert pool.allocate(4) == [2, 1, 4, 5]


@pytest.mark.parametrize("pages", [[0], [3], [9], [-1], [1, 1]])
def test_freeing_what_is_not_in_use_is_an_error_and_frees_nothing(pages):
    pool = PagePool(4, page_size=4)
    pool.allocate(2)
    with pytest.raises(ProtocolError):
        pool.free([2, *pages])
    assert pool.num_free_pages == 1


def test_a_page_cannot_be_freed_twice():
    pool = PagePool(4, page_size=4)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(ProtocolError):
        pool.free(pages)


@property_settings(max_examples=50)
@given(num_tokens=st.integers(0, 200), page_size=st.integers(1, 20))
def test_pages_hold_the_tokens_and_no_page_is_spare(num_tokens, page_size):
    pages = pages_for_tokens(num_tokens, page_size)
    assert (pages - 1) * page_size < num_tokens <= pages * page_size
    assert PagePool(2, page_size).pages_for(num_tokens) == pages


@pytest.mark.parametrize(("num_pages", "page_size", "path"), [(1, 4, "engine.num_pages"), (4, 0, "engine.page_size")])
def test_pool_without_room_names_the_setting(num_pages, page_size, path):
    with pytest.raises(ConfigError, match=path):
        PagePool(num_pages, page_size)
