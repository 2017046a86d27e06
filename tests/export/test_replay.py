"""A replay finds what differs, says it, and refuses what is too far away."""

import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.export.replay import compare_rows, require_close

TEXTS = [[1, 2, 3], [4, 5]]


def logits(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(tokens), 320, generator=generator) for tokens in TEXTS]


def compare(theirs: list[torch.Tensor], tokenizer):
    answers = iter(theirs)
    return compare_rows(TEXTS, logits(), lambda tokens: next(answers), tokenizer)


def test_the_same_model_is_no_distance_away(tokenizer):
    found = compare(logits(), tokenizer)
    assert (found.largest, found.typical, found.divergence) == (0.0, 0.0, 0.0)
    assert (found.prompts, found.tokens, found.disagreements, found.first) == (2, 5, 0, "")
    assert found.spread == pytest.approx(1.0, abs=0.1)
    require_close(found, 1e-9, "it")
    assert "every likeliest token is the same" in "\n".join(found.lines("it"))


def test_one_changed_logit_is_found_where_it_is(tokenizer):
    theirs = logits()
    other = int(theirs[1][0].argsort()[0])
    theirs[1][0, other] = theirs[1][0].max() + 1
    found = compare(theirs, tokenizer)
    before = logits()[1][0]
    assert found.largest == pytest.approx(float(before.max() + 1 - before[other]))
    assert found.disagreements == 1
    assert "after token 1 of prompt 2" in found.first
    assert repr(tokenizer.decode([other], keep_special=True)) in found.first
    expected = (found.largest**2 / (5 * 320)) ** 0.5
    assert found.typical == pytest.approx(expected, rel=1e-4)


def test_another_model_is_refused(tokenizer):
    found = compare(logits(1), tokenizer)
    assert found.typical / found.spread == pytest.approx(2**0.5, abs=0.1)
    with pytest.raises(InputError, match="differs from the model") as caught:
        require_close(found, 1.0, "the q4_0 file")
    assert "\n" not in str(caught.value)


def test_not_a_number_is_refused(tokenizer):
    broken = logits()
    broken[0][1, 7] = float("nan")
    found = compare(broken, tokenizer)
    with pytest.raises(InputError):
        require_close(found, 1e9, "it")


def test_divergence_is_that_of_the_distributions(tokenizer):
    theirs = [tensor * 0.5 for tensor in logits()]
    ours = torch.cat(logits()).double()
    expected = torch.nn.functional.kl_div(
        (ours * 0.5).log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert compare(theirs, tokenizer).divergence == pytest.approx(float(expected) / 5, rel=1e-4)
