"""The cache: what goes in comes out in order, growing changes nothing, and cached logits are uncached logits."""

import itertools

import pytest
import torch

from glasshouse.inference.cache import ContiguousCache
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
