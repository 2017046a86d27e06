"""Reading over a paged cache: the same numbers as a contiguous one, and the same bits however and beside whom it is read."""

import math

import pytest
import torch

from glasshouse.inference.cache import ContiguousCache, PagedCache
from glasshouse.inference.paged import Piece, PromptView, Reader, RowsView, equal_sizes, fitting
from glasshouse.models.decoder import Decoder, DecoderConfig

LAYOUTS = {
    "grouped": {},
    "gpt2": {
        "position": "learned",
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
        "bias": "all",
    },
    "sliding": {"sliding_window": 20, "query_key_norm": False},
}
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_decoder(dtype=torch.float32, **changes):
    shape = {
        "vocab_size": 61, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "feed_forward_dim": 48, "context_length": 300,
    }  # fmt: skip
    model = Decoder(DecoderConfig(**{**shape, **changes}))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return model.eval().to(dtype)


def text(length, seed=1):
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_text(reader, tokens, cuts, prompt):
    """Logits of a text whose first tokens are read in pieces that end at the cuts, the rest token by token."""
    table, found, start = [], [], 0
    for end in cuts:
        assert reader.cache.reserve(table, start, end)
        found.append(reader.read_pieces([Piece(tokens[start:end], table, start)]))
        start = end
    for place in range(prompt, len(tokens)):
        assert reader.cache.reserve(table, place, place + 1)
        found.append(reader.read_rows(tokens[place : place + 1], [table], [place]))
    logits = reader.logits(torch.cat(found))
    reader.cache.truncate(table, 0)
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_paged_is_contiguous(layout):
    model, tokens = random_decoder(**LAYOUTS[layout]), text(150)
    reader = Reader(model, PagedCache(model, 20, 16), 16, 64)
    contiguous = ContiguousCache(2)
    with torch.inference_mode():
        pieces = [model(torch.tensor([tokens[:100]]), cache=contiguous)]
        pieces += [model(torch.tensor([[token]]), cache=contiguous) for token in tokens[100:]]
        expected = model.logits(torch.cat(pieces, 1))[0]
    found = read_text(reader, tokens, (64, 100), 100)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("block_size", [4, 16, 24])
def test_the_cuts_of_a_prompt_change_no_bit(layout, dtype, block_size):
    model, tokens = random_decoder(FORMATS[dtype], **LAYOUTS[layout]), text(160)
    reader = Reader(model, PagedCache(model, 50, block_size), 16, 64)
    whole = read_text(reader, tokens, (64, 128, 150), 150)
    # Something else lies in the memory now, and the blocks come in another order.
    other: list[int] = []
    reader.cache.reserve(other, 0, 3 * block_size)
    read_text(reader, text(90, seed=2), (64, 90), 90)
    reader.cache.truncate(other, 0)
    for cuts in ((16, 80, 144, 150), (1, 2, 60, 100, 149, 150), (48, 112, 113, 150)):
        assert torch.equal(read_text(reader, tokens, cuts, 150), whole), cuts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_company_changes_no_bit(layout, dtype):
    """Seventeen texts of different lengths: read alone, and all together, in pieces and in rows."""
    model = random_decoder(FORMATS[dtype], **LAYOUTS[layout])
    reader = Reader(model, PagedCache(model, 120, 16), 17, 64)
    texts = [text(3 + 7 * number, seed=number) for number in range(17)]
    alone, tables = [], [[] for _ in texts]
    for tokens in texts:
        end = len(tokens) - 1
        alone.append(read_text(reader, tokens, (*range(min(64, end), end, 64), end), end)[-2:])
    last, waiting = {}, [(number, 0) for number in range(17)]
    while waiting:  # four prompts at a time, 16 tokens of each
        now, waiting = waiting[:4], waiting[4:]
        pieces = []
        for number, start in now:
            end = min(start + 16, len(texts[number]) - 1)
            assert reader.cache.reserve(tables[number], start, end)
            pieces.append(Piece(texts[number][start:end], tables[number], start))
        hidden = reader.read_pieces(pieces).split([len(piece.tokens) for piece in pieces])
        for (number, _), piece, found in zip(now, pieces, hidden, strict=True):
            last[number] = found[-1:]
            waiting += [(number, piece.end)] if piece.end < len(texts[number]) - 1 else []
    places = [len(tokens) - 1 for tokens in texts]
    for table, place in zip(tables, places, strict=True):
        assert reader.cache.reserve(table, place, place + 1)
    rows = reader.read_rows([tokens[-1] for tokens in texts], tables, places)
    together = reader.logits(torch.cat([torch.cat([last[number] for number in range(17)]), rows]))
    for number in range(17):
        assert torch.equal(together[[number, 17 + number]], alone[number]), number


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_tokens_read_again_at_once_have_the_same_bits(layout, dtype):
    """What was written token by token is read as many rows of one text: after it was put aside, or as a guess."""
    model, tokens = random_decoder(FORMATS[dtype], **LAYOUTS[layout]), text(90)
    reader = Reader(model, PagedCache(model, 50, 16), 32, 64)
    one_by_one = read_text(reader, tokens, (40,), 40)[40:]
    table: list[int] = []
    reader.cache.reserve(table, 0, 90)
    reader.read_pieces([Piece(tokens[:40], table, 0)])
    at_once = reader.logits(reader.read_rows(tokens[40:], [table] * 50, list(range(40, 90))))
    assert torch.equal(at_once, one_by_one)


def test_rows_that_agree_are_found():
    model = random_decoder()
    groups = equal_sizes(model, 64)
    assert sorted(size for group in groups for size in group) == [1, 2, 4, 8, 16, 32, 64]
    reader = Reader(model, PagedCache(model, 8, 16), 64, 64)
    hidden = torch.randn(64, 32)
    whole = reader.logits(hidden)
    for count in range(1, 65):
        assert torch.equal(reader.logits(hidden[:count]), whole[:count])
        assert torch.equal(reader.logits(hidden[-count:]), whole[-count:])


def test_a_model_whose_rows_depend_on_their_number_is_read_in_one_number():
    """A product that adds up in another order for each number of rows, as matrix libraries do."""

    class Fickle(torch.nn.Linear):
        def forward(self, rows):
            return super().forward(rows) * (1 + math.log2(rows.shape[-2]) / 1024)

    model = random_decoder()
    model.layers[0].feed_forward.down = Fickle(48, 32, bias=False)
    assert equal_sizes(model, 32) == [[32], [16], [8], [4], [2], [1]]


def test_fitting():
    assert [fitting(count, (1, 4, 8)) for count in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, 9]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tap_sees_the_patterns_and_changes_nothing(layout):
    model, tokens = random_decoder(**LAYOUTS[layout]), text(40)
    cache, seen = PagedCache(model, 10, 16), {}

    def tap(name, value):
        seen.setdefault(name, []).append(value)
        return value

    with torch.inference_mode():
        patterns = {}
        model(torch.tensor([tokens]), tap=lambda name, value: patterns.setdefault(name, value))
        plain = model(torch.tensor([tokens]))
        table: list[int] = []
        cache.reserve(table, 0, 40)
        read = model(
            torch.tensor([tokens[:39]]), positions=torch.arange(39)[None],
            cache=PromptView(cache, [Piece(tokens[:39], table, 0)]), tap=tap,
        )  # fmt: skip
        row = model(
            torch.tensor([tokens[39:]]), positions=torch.tensor([[39]]), cache=RowsView(cache, [table], [39]), tap=tap
        )  # fmt: skip
    torch.testing.assert_close(torch.cat([read, row], 1), plain, atol=1e-5, rtol=1e-5)
    tile, last = seen["layers.1.attention.pattern"]
    expected = patterns["layers.1.attention.pattern"]
    torch.testing.assert_close(tile[:, :, :, :39], expected[:, :, :39, :39], atol=1e-5, rtol=1e-5)
    start = 0 if layout != "sliding" else 16  # blocks before the window are not read
    torch.testing.assert_close(last[0, :, 0, : 40 - start], expected[0, :, 39, start:], atol=1e-5, rtol=1e-5)
