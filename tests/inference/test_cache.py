"""The cache: what goes in comes out in order, growing changes nothing, and cached logits are uncached logits."""

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from glasshouse.inference.cache import BlockPool, ContiguousCache, PagedCache, free_blocks
from glasshouse.models.decoder import Decoder, DecoderConfig


def small_decoder(seed=0, **changes):
    """A decoder with weights that are large enough for every layer to matter (fresh ones start at zero)."""
    shape = {
        "vocab_size": 61, "embedding_dim": 32, "num_layers": 3, "num_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "feed_forward_dim": 48, "context_length": 64,
    }  # fmt: skip
    model = Decoder(DecoderConfig(**{**shape, **changes}))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return model.eval()


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_extend_returns_everything_so_far(capacity):
    cache, whole = (
        ContiguousCache(2, capacity),
        torch.randn(2, 2, 3, 40, 4),
    )  # layers, rows, heads, tokens, width
    for start, stop in itertools.pairwise((0, 5, 6, 7, 20, 40)):
        for layer in range(2):
            assert cache.length == start
            piece = whole[layer, :, :, start:stop]
            keys, values = cache.extend(layer, piece, 2 * piece)
            assert torch.equal(keys, whole[layer, :, :, :stop])
            assert torch.equal(values, 2 * whole[layer, :, :, :stop])
        assert cache.length == stop
    assert cache.capacity >= 40


def test_memory_is_not_moved_while_there_is_room():
    cache = ContiguousCache(1, 10)
    first, _ = cache.extend(0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    second, _ = cache.extend(0, torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2))
    third, _ = cache.extend(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert first.data_ptr() == second.data_ptr() != third.data_ptr()
    assert cache.capacity == 20


def test_a_failed_pass_leaves_the_cache_as_it_was():
    cache, new = ContiguousCache(2, 4), torch.ones(1, 1, 2, 2)
    cache.extend(0, new, new)  # and then the second layer never comes
    assert cache.length == 0
    for layer in range(2):
        keys, _ = cache.extend(layer, 3 * new, new)
        assert torch.equal(keys, 3 * new)
    assert cache.length == 2


SHAPES = [
    {},
    {"position": "learned", "norm": "layer", "gated": False, "activation": "gelu_tanh", "bias": "all"},
    {"sliding_window": 4, "query_key_norm": False},
    {"num_key_value_heads": 4, "tie_embeddings": False},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_cached_logits_are_uncached_logits_for_every_split(changes):
    """A prompt of 7 tokens cut into pieces in all 64 ways, float32, capacity small enough to grow on the way."""
    model, tokens = (
        small_decoder(**changes),
        torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1)),
    )
    with torch.inference_mode():
        whole = model.logits(model(tokens))
        alone = model.logits(model(tokens[:, -1:], positions=torch.tensor([[6]])))
        assert (whole[:, -1:] - alone).abs().max() > 0.1  # what was read before does matter
        for cuts in itertools.product((False, True), repeat=6):
            borders = [0, *(place for place, cut in enumerate(cuts, 1) if cut), 7]
            cache = ContiguousCache(3, 2)
            pieces = [
                model(tokens[:, start:stop], cache=cache) for start, stop in itertools.pairwise(borders)
            ]
            torch.testing.assert_close(model.logits(torch.cat(pieces, 1)), whole, atol=1e-5, rtol=1e-5)


def test_a_long_decode_stays_equal():
    model, tokens = small_decoder(), torch.randint(0, 61, (1, 60), generator=torch.Generator().manual_seed(2))
    cache = ContiguousCache(3, 4)
    with torch.inference_mode():
        pieces = [model(tokens[:, place : place + 1], cache=cache) for place in range(60)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-5, rtol=1e-5)


class PoolMachine(RuleBasedStateMachine):
    """Blocks are taken, shared, named and given back at random; a plain model of who holds what must agree."""

    def __init__(self):
        super().__init__()
        self.pool, self.held, self.contents = BlockPool(6), [], {}
        self.clock = itertools.count()

    @rule()
    def take(self):
        if self.pool.free == 0:
            with pytest.raises(IndexError):
                self.pool.take()
            return
        block = self.pool.take()
        assert 1 <= block <= 6
        assert block not in self.held, "a block was given out twice"
        self.held.append(block)
        self.contents[block] = next(self.clock)

    @rule(data=st.data())
    def hold(self, data):
        if self.held:
            block = data.draw(st.sampled_from(self.held))
            self.pool.hold(block)
            self.held.append(block)

    @rule(data=st.data())
    def give_back(self, data):
        if self.held:
            block = data.draw(st.sampled_from(self.held))
            self.held.remove(block)
            self.pool.give_back(block)

    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c"]))
    def remember(self, data, name):
        if self.held:
            block = data.draw(st.sampled_from(self.held))
            if self.pool.find(name) is None:
                self.contents[name] = self.contents[block]
            self.pool.remember(block, name)

    @rule(name=st.sampled_from([b"a", b"b", b"c"]))
    def reuse(self, name):
        block = self.pool.find(name)
        if block is not None:
            assert self.contents[block] == self.contents[name], "a name led to a block with other contents"
            self.pool.hold(block)
            self.held.append(block)

    @invariant()
    def nothing_leaks(self):
        assert self.pool.free == 6 - len(set(self.held))
        for block in range(1, 7):
            assert self.pool.holders(block) == self.held.count(block)

    def teardown(self):
        for block in self.held:
            self.pool.give_back(block)
        assert self.pool.free == 6
        assert sorted(self.pool.take() for _ in range(6)) == [1, 2, 3, 4, 5, 6]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_block_given_back_twice_is_an_error():
    pool = BlockPool(2)
    block = pool.take()
    pool.give_back(block)
    with pytest.raises(ValueError, match="held by nobody"):
        pool.give_back(block)


def test_known_blocks_are_evicted_last_and_the_oldest_first():
    pool = BlockPool(4)
    first, second, unknown, _ = (pool.take() for _ in range(4))
    pool.remember(first, b"first")
    pool.remember(second, b"second")
    for block in (first, unknown, second):
        pool.give_back(block)
    assert pool.take() == unknown
    assert pool.find(b"first") == first
    assert pool.take() == first
    assert pool.find(b"first") is None
    assert pool.find(b"second") == second


def paged(blocks=8, block_size=4):
    return PagedCache(small_decoder(), blocks, block_size)


def test_reserve_takes_what_is_needed_or_nothing():
    cache, table, other = paged(blocks=3), [], []
    assert cache.reserve(table, 0, 5)
    assert len(table) == 2
    assert cache.reserve(table, 5, 8)
    assert len(table) == 2
    assert not cache.reserve(other, 0, 5)
    assert (other, cache.pool.free) == ([], 1)
    cache.truncate(table, 4)
    assert (len(table), cache.pool.free) == (1, 2)
    cache.truncate(table, 0)
    assert cache.pool.free == 3


def test_a_fork_shares_and_copies_what_it_writes():
    cache, table = paged(), []
    cache.reserve(table, 0, 6)
    cache.keys[0][table] = torch.arange(2 * 4 * 2 * 8, dtype=torch.float).view(2, 4, 2, 8)
    twin = cache.fork(table)
    assert cache.pool.free == 6  # nothing is copied yet
    assert cache.reserve(twin, 6, 7)
    assert twin[0] == table[0]
    assert twin[1] != table[1]
    assert torch.equal(cache.keys[0][twin], cache.keys[0][table])
    cache.keys[0][twin[1]] = -1
    assert (cache.keys[0][table[1]] >= 0).all()
    for text in (table, twin):
        cache.truncate(text, 0)
    assert cache.pool.free == 8


def test_a_fork_that_cannot_be_copied_changes_nothing():
    cache, table = paged(blocks=2), []
    cache.reserve(table, 0, 8)
    twin = cache.fork(table)
    assert not cache.reserve(twin, 7, 8)
    assert twin == table


def test_new_blocks_are_empty_whatever_was_in_them():
    cache, table = paged(blocks=2), []
    cache.reserve(table, 0, 8)
    cache.memory[:, :, table] = torch.nan
    cache.truncate(table, 0)
    cache.reserve(table, 0, 8)
    assert not cache.memory.any()


def test_blocks_are_as_many_as_memory_and_need_allow(monkeypatch):
    monkeypatch.setattr("glasshouse.inference.cache._free_memory", lambda device: 4 * 1000 * 384 * 4)
    # 3 layers, 2 heads of 8 numbers, keys and values, float32: 384 bytes a token, 1536 a block of 4.
    assert free_blocks(small_decoder(), 4, 10**9) == 1000
    assert free_blocks(small_decoder(), 4, 21) == 6
    monkeypatch.setattr("glasshouse.inference.cache._free_memory", lambda device: 0)
    assert free_blocks(small_decoder(), 4, 10**9) == 1
