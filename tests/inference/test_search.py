"""Beam search: exhaustive where that is possible, shared blocks, batches, and the ends of everything."""

import itertools
import math

import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.inference.cache import ContiguousCache
from glasshouse.inference.paged import PagedCache, Reader
from glasshouse.inference.search import (
    BeamConfig,
    BeamState,
    search,
    search_continuation,
    search_translations,
)
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

VOCABULARY = 40
END = 1


def at_random(model, seed=3, scale=0.4):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return at_random(Decoder(DecoderConfig(VOCABULARY, 32, 2, 4, 2, 8, 48, 64, tie_embeddings=False)))


@pytest.fixture(scope="module")
def translator():
    config = EncoderDecoderConfig(VOCABULARY, 32, 2, 2, 4, 8, 48, 64)
    return at_random(EncoderDecoder(config))


def reader_of(model, blocks=64, block_size=4):
    return Reader(model, PagedCache(model, blocks, block_size), 4, 16)


def table_model(scores):
    """A reader of a Markov chain: log-probabilities of the next token after each token."""

    def read(parents, tokens):
        return scores[torch.tensor(tokens)]

    return read


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.7, 2.0])
def test_as_many_beams_as_texts_is_exhaustive_search(penalty):
    """With more beams than there are texts nothing is lost: the answer is the best of all texts, by its definition."""
    random = torch.Generator().manual_seed(0)
    scores = (2 * torch.randn(4, 4, generator=random)).log_softmax(-1)
    config = BeamConfig(beams=64, answers=5, length_penalty=penalty, early_stopping="never", max_new_tokens=4)
    state = BeamState(config, [0])
    search([state], scores[2:3], table_model(scores))
    texts = []
    for length in range(1, 5):
        for middle in itertools.product(range(1, 4), repeat=length - 1):
            texts += [(*middle, last) for last in (range(4) if length == 4 else [0])]
    expected = sorted(
        ((log_probability(scores, 2, text) / len(text) ** penalty, text) for text in texts), reverse=True
    )
    assert len(texts) > 64
    found = [(answer.score, answer.tokens) for answer in state.answers]
    # Ends are kept only where they are among the best 64 candidates, which at 4 · 27 candidates the best always are.
    assert [text for _, text in found] == [text for _, text in expected[:5]]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected[:5]], rel=1e-5)


def log_probability(scores, start, text):
    return sum(float(scores[before, token]) for before, token in zip((start, *text), text, strict=False))


def test_one_beam_is_greedy(model):
    found = search_continuation(
        reader_of(model), [5, 9, 3], BeamConfig(1, max_new_tokens=12), [END], VOCABULARY
    )
    tokens = [5, 9, 3]
    with torch.inference_mode():
        while len(tokens) < 15 and tokens[-1] != END:
            tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    assert list(found[0].tokens) == tokens[3:]


def test_scores_are_the_models_own(model):
    config = BeamConfig(4, answers=4, length_penalty=0.8, max_new_tokens=9)
    answers = search_continuation(reader_of(model), [7, 2], config, [END], VOCABULARY)
    assert len({answer.tokens for answer in answers}) == 4
    assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)
    for tokens, score in answers:
        with torch.inference_mode():
            logs = model.logits(model(torch.tensor([[7, 2, *tokens]])))[0].log_softmax(-1)
        total = sum(float(logs[place + 1, token]) for place, token in enumerate(tokens))
        assert score == pytest.approx(total / len(tokens) ** 0.8, rel=1e-4)
        assert END not in tokens[:-1]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_shared_blocks_are_texts_of_their_own(model, early_stopping, block_size):
    """Over the paged cache as by reading every beam's whole text again; and every block is given back."""
    reader = reader_of(model, 256 // block_size, block_size)
    prompt, config = [3, 14, 15, 9, 2, 6], BeamConfig(5, 5, 1.3, early_stopping, 14)
    found = search_continuation(reader, prompt, config, [END, 8], VOCABULARY)
    texts = [[*prompt]]

    @torch.inference_mode()
    def read_again(parents, tokens):
        texts[:] = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return model.logits(model(torch.tensor(texts)))[:, -1]

    state = BeamState(config, [END, 8])
    with torch.inference_mode():
        search([state], model.logits(model(torch.tensor([prompt])))[:, -1], read_again)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in state.answers]
    assert reader.cache.pool.free == reader.cache.pool.total


def test_more_than_one_text_is_at_work(model):
    """Searching finds what greedy decoding does not."""
    wins = 0
    for start in range(5, 25):

        def best(beams, start=start):
            config = BeamConfig(beams, length_penalty=0.0, early_stopping="never", max_new_tokens=8)
            return search_continuation(reader_of(model), [start], config, [END], VOCABULARY)[0].score

        greedy, wide = best(1), best(8)
        assert wide > greedy - 1.0
        wins += wide > greedy + 1e-4
    assert wins >= 10


def test_a_cache_too_small_is_named_and_nothing_is_left(model):
    reader = reader_of(model, blocks=6)
    with pytest.raises(InputError, match="no room for"):
        search_continuation(reader, [5] * 10, BeamConfig(6, max_new_tokens=30), [END], VOCABULARY)
    assert reader.cache.pool.free == reader.cache.pool.total


def test_the_context_ends_a_text(model):
    answers = search_continuation(reader_of(model), [5] * 60, BeamConfig(3, 3), [END], VOCABULARY)
    assert max(len(answer.tokens) for answer in answers) == 4
    with pytest.raises(InputError, match="reads at most 64"):
        search_continuation(reader_of(model), [5] * 64, BeamConfig(3), [END], VOCABULARY)


def test_rows_that_are_no_tokens_never_come(model):
    answers = search_continuation(reader_of(model), [5], BeamConfig(4, 4, max_new_tokens=12), [END], 12)
    assert max(token for answer in answers for token in answer.tokens) < 12


SOURCES = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 0, 0, 0], [30, 2, 11, 12, 0]])
SEEN = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_sources_together_are_sources_alone(translator, early_stopping):
    config = BeamConfig(4, 3, 1.1, early_stopping, 12)
    together = search_translations(translator, SOURCES, SEEN, config, start_token=0, end_tokens=[END])
    for source, seen, answers in zip(SOURCES, SEEN, together, strict=True):
        [alone] = search_translations(
            translator, source[seen][None], None, config, start_token=0, end_tokens=[END]
        )
        assert [answer.tokens for answer in alone] == [answer.tokens for answer in answers]
        assert [answer.score for answer in alone] == pytest.approx(
            [answer.score for answer in answers], rel=1e-4
        )
    assert len({answers[0].tokens for answers in together}) == 3


def test_translations_are_full_recomputation(translator):
    """The cache that follows the beams, as by reading every target again."""
    config, texts = BeamConfig(4, 4, 0.9, False, 12), [[0]]
    [found] = search_translations(translator, SOURCES[:1], None, config, start_token=0, end_tokens=[END])

    @torch.inference_mode()
    def read_again(parents, tokens):
        texts[:] = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        memory = translator.encode(SOURCES[:1]).expand(len(texts), -1, -1)
        return translator.logits(translator(torch.tensor(texts), memory=memory))[:, -1]

    state = BeamState(config, [END])
    with torch.inference_mode():
        search(
            [state],
            translator.logits(translator(torch.tensor([[0]]), memory=translator.encode(SOURCES[:1])))[:, -1],
            read_again,
        )
    assert [answer.tokens for answer in found] == [answer.tokens for answer in state.answers]


def test_reordering_a_cache_moves_whole_rows():
    cache, random = ContiguousCache(2, 4), torch.Generator().manual_seed(0)
    key = torch.randn(3, 2, 3, 4, generator=random)
    for layer in range(2):
        cache.extend(layer, key + layer, key - layer)
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    new = torch.randn(4, 2, 1, 4, generator=random)
    for layer in range(2):
        keys, values = cache.extend(layer, new, new)
        assert torch.equal(keys, torch.cat([key[[2, 0, 0, 1]] + layer, new], 2))
        assert torch.equal(values, torch.cat([key[[2, 0, 0, 1]] - layer, new], 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"beams": 0},
        {"beams": 65},
        {"beams": 2.0},
        {"answers": 5},
        {"answers": 0},
        {"length_penalty": math.nan},
        {"length_penalty": 11},
        {"early_stopping": "always"},
        {"early_stopping": 1},
        {"max_new_tokens": 0},
    ],
)
def test_every_number_is_checked(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        BeamConfig(**wrong)


def test_a_broken_model_is_refused(model):
    state = BeamState(BeamConfig(2), [END])
    with pytest.raises(InputError, match="not finite"):
        search([state], torch.full((1, 5), math.nan), table_model(torch.zeros(5, 5)))
