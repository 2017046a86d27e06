"""Learning from comparisons: losses of the log-probabilities of two answers, and the pairs they are computed on.

A loss is a plain function of log-probabilities (and lengths), one number for each pair; what a model before training
gave the answers (the reference) is computed once. Knows decoders and lessons; nothing of optimizers and run folders.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder
from glasshouse.text.examples import Example, ExampleCounts
from glasshouse.text.packing import Batch, permute
from glasshouse.text.supervision import IGNORED, Lesson, encode_conversation
from glasshouse.text.tokenizer import Tokenizer
from glasshouse.training.distributed import sum_numbers
from glasshouse.training.objectives import Objective, TokenBatch, label_log_probabilities, to_device

BETAS = {"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}
"""The usual strength of each loss, as its paper has it."""
NEEDS_REFERENCE = ("dpo", "kto")


@dataclass(frozen=True)
class Comparison:
    """Two answers to compare.

    Args:
        row: where they were read.
        first: the answer: the better one of a pair, or one that was judged.
        second: the worse one of a pair; beside a judged one, an answer to another question (for KTO's reference point).
        good: what was judged; True for a pair.
    """

    row: str
    first: Lesson
    second: Lesson
    good: bool = True


@dataclass(frozen=True)
class PreferenceBatch:
    """Comparisons on the device that trains.

    Args:
        first: tokens of the first answers, [B, T].
        second: tokens of the second, [B, S].
        reference: log-probabilities of both before training, float32 [B, 2].
        good: bool [B].
    """

    first: TokenBatch
    second: TokenBatch
    reference: Tensor
    good: Tensor


# ---- losses: float32 [B] each


def dpo_loss(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    Args:
        chosen: log-probability of the better answer, [B].
        rejected: of the worse one, [B].
        reference: of both under the reference, [B, 2].
        beta: how strongly the model is held to the reference.
    """
    return -logsigmoid(beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1])))


def orpo_loss(chosen: Tensor, rejected: Tensor, lengths: Tensor, weight: float) -> Tensor:
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7): the better answer is
    learned, and its odds are raised above the worse one's; both by the mean log-probability of a token.

    Args:
        chosen: log-probability of the better answer, [B].
        rejected: of the worse one, [B].
        lengths: tokens of both, [B, 2].
        weight: of the odds ratio.
    """
    means = torch.stack([chosen, rejected], 1) / lengths
    odds = means - torch.log(-torch.expm1(means.clamp_max(-1e-6)))
    return -means[:, 0] - weight * logsigmoid(odds[:, 0] - odds[:, 1])


def simpo_loss(chosen: Tensor, rejected: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, equation 6): no reference, lengths divided out.

    Args:
        chosen: log-probability of the better answer, [B].
        rejected: of the worse one, [B].
        lengths: tokens of both, [B, 2].
        beta: what the mean log-probabilities are scaled by.
        gamma: the margin that is aimed at.
    """
    return -logsigmoid(beta * (chosen / lengths[:, 0] - rejected / lengths[:, 1]) - gamma)


def kto_loss(answer: Tensor, reference: Tensor, good: Tensor, divergence: Tensor, beta: float) -> Tensor:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8), both weights 1.

    Args:
        answer: log-probability of a judged answer, [B].
        reference: the same under the reference, [B].
        good: whether it was judged good, bool [B].
        divergence: the reference point z0, a scalar from 0: see `divergence_of`.
        beta: how soon a gain or a loss is enough.
    """
    gain = answer - reference - divergence
    return 1 - torch.sigmoid(beta * torch.where(good, gain, -gain))


def divergence_of(mismatched: Tensor, reference: Tensor) -> Tensor:
    """KTO's estimate of how far the model is from the reference: the mean over answers that belong to other questions, at
    least 0 and without a gradient (arXiv:2402.01306, section 4.1)."""
    return ((mismatched - reference).sum() / max(1, len(mismatched))).clamp_min(0).detach()


# ---- from models to losses


def sequence_log_probabilities(model: Decoder, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's learned tokens, summed, in nats, float32 [B]; and their number [B]."""
    hidden = model(batch.tokens, positions=batch.positions, documents=batch.documents)
    learned = batch.labels != IGNORED
    logs = label_log_probabilities(hidden[learned], model.output_weight, batch.labels[learned])
    rows = learned.nonzero()[:, 0]
    sums = torch.zeros(len(learned), dtype=torch.float32, device=logs.device).index_add(0, rows, logs)
    return sums, learned.sum(1)


@dataclass
class Figures:
    """What is counted while comparisons are learned.

    Args:
        sums: [comparisons, how many of them are told right, sum of their margins in nats].
    """

    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, margins: Tensor) -> None:
        """Count some comparisons: a positive margin is one that is told right."""
        own = [float(len(margins)), float((margins > 0).sum()), float(margins.sum())]
        self.sums = [total + more for total, more in zip(self.sums, own, strict=True)]

    def take(self) -> dict[str, float]:
        """Accuracy and mean margin since the last time, over all processes."""
        count, right, margin = sum_numbers(self.sums)
        self.sums = [0.0, 0.0, 0.0]
        return {"accuracy": right / count, "margin": margin / count} if count else {}


def preference_objective(task: str, beta: float, gamma: float, figures: Figures) -> Objective:
    """The objective of a task on a `PreferenceBatch`: (summed loss, number of comparisons).

    The margin that `figures` counts is that of the task's own implicit reward (DPO: difference of the log-ratios; ORPO
    and SimPO: of the mean log-probabilities; KTO: the log-ratio above its reference point, negated for a bad answer).

    Args:
        task: "dpo", "orpo", "kto" or "simpo".
        beta: strength.
        gamma: SimPO's margin.
        figures: told of each batch.
    """

    def objective(model: Decoder, batch: PreferenceBatch) -> tuple[Tensor, int]:
        first, first_length = sequence_log_probabilities(model, batch.first)
        reference = batch.reference
        if task == "kto":
            with torch.no_grad():
                second, _ = sequence_log_probabilities(model, batch.second)
            divergence = divergence_of(second, reference[:, 1])
            loss = kto_loss(first, reference[:, 0], batch.good, divergence, beta)
            gain = first - reference[:, 0] - divergence
            figures.add(torch.where(batch.good, gain, -gain).detach())
            return loss.sum(), len(loss)
        second, second_length = sequence_log_probabilities(model, batch.second)
        lengths = torch.stack([first_length, second_length], 1)
        if task == "dpo":
            loss = dpo_loss(first, second, reference, beta)
            margins = first - second - reference[:, 0] + reference[:, 1]
        else:
            margins = first / lengths[:, 0] - second / lengths[:, 1]
            simple = task == "simpo"
            loss = (simpo_loss(first, second, lengths, beta, gamma) if simple
                    else orpo_loss(first, second, lengths, beta))  # fmt: skip
        figures.add(margins.detach())
        return loss.sum(), len(loss)

    return objective


# ---- from examples to batches


def encode_comparisons(
    tokenizer: Tokenizer, examples: Sequence[Example], context: int, counts: ExampleCounts, task: str
) -> list[Comparison]:
    """Examples as comparisons; only the last answer of a conversation is learned from.

    Args:
        tokenizer: of the model that will learn.
        examples: pairs; for "kto" also judged answers, and each pair counts as a good and a bad one.
        context: most tokens of a conversation.
        counts: what is left out because it lacks a side, or is too long, is counted here.
        task: what they are for.

    Raises:
        InputError: nothing is left.
    """
    found: list[Comparison] = []
    for example in examples:
        if not example.rejected and task != "kto":
            counts.drop("no rejected answer", example.row)
            continue
        sides = [_encode_answer(tokenizer, example, answer) for answer in (example.answer, example.rejected) if answer]  # fmt: skip
        if max(len(side.tokens) for side in sides) > context:
            counts.drop(f"longer than {context:,} tokens", example.row)
        elif task == "kto":
            goods = (True, False) if example.rejected else (example.good,)
            found += [Comparison(example.row, side, side, good) for side, good in zip(sides, goods, strict=True)]  # fmt: skip
        else:
            found.append(Comparison(example.row, sides[0], sides[1]))
    if not found:
        told = "".join(f"; {line}" for line in counts.lines())
        raise InputError(f"no pair of answers is left{told}", "the data", "give prompt, chosen and rejected")
    return _mismatch(found) if task == "kto" else found


def _encode_answer(tokenizer: Tokenizer, example: Example, answer: Sequence[object]) -> Lesson:
    whole = encode_conversation(tokenizer, [*example.messages, *answer], example.row, example.tools)  # pyright: ignore[reportArgumentType]
    asked = len(tokenizer.encode_chat(example.messages, example.tools or None))
    learned = whole.learned.copy()
    learned[: min(asked, len(learned) - 1)] = False
    return Lesson(whole.row, whole.tokens, learned)


def _mismatch(found: list[Comparison]) -> list[Comparison]:
    """Beside each judged answer, its question with the answer of the next example that asks something else."""
    made = []
    for number, own in enumerate(found):
        others = (found[(number + step) % len(found)] for step in range(1, len(found)))
        other = next((one for one in others if one.row != own.row), own).first
        question, answer = own.first.tokens[: int(own.first.learned.argmax())], other.tokens[other.learned]
        room = max(0, max(len(own.first.tokens), len(other.tokens)) - len(question))
        answer = answer[: max(1, room)]
        tokens = np.concatenate([question, answer])
        learned = np.arange(len(tokens)) >= len(question)
        made.append(Comparison(own.row, own.first, Lesson(own.row, tokens, learned), own.good))
    return made


def pad_lessons(lessons: Sequence[Lesson], pad: int, device: Device) -> TokenBatch:
    """Lessons as rows of one length, padded on the right: a row each."""
    length = max((len(lesson.tokens) for lesson in lessons), default=1)
    shape = (len(lessons), length)
    tokens, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for index, lesson in enumerate(lessons):
        size = len(lesson.tokens)
        tokens[index, :size] = lesson.tokens
        labels[index, : size - 1] = np.where(lesson.learned[1:], lesson.tokens[1:], IGNORED)
    places = np.broadcast_to(np.arange(length), shape).copy()
    return to_device(Batch(tokens, labels, places, np.zeros(shape, dtype=np.int32)), device, False)


class Comparisons:
    """Comparisons dealt out in batches; which are in batch number `step` depends on nothing else but the seed.

    Args:
        items: the comparisons.
        pad: the id that fills a row up.
        seed: of the order.
        device: where batches go.
        micro_rows: comparisons computed at once.
    """

    def __init__(self, items: Sequence[Comparison], pad: int, seed: int, device: Device, micro_rows: int):
        self.items, self.pad, self.seed = list(items), pad, seed
        self.device, self.micro_rows = device, micro_rows
        self.reference = torch.zeros(len(self.items), 2)

    @torch.no_grad()
    def refer(self, model: Decoder) -> None:
        """Compute what a model gives every answer, and keep it as the reference."""
        model.eval()
        for start in range(0, len(self.items), self.micro_rows):
            numbers = list(range(start, min(start + self.micro_rows, len(self.items))))
            batch = self.collate(numbers)
            both = [sequence_log_probabilities(model, side)[0] for side in (batch.first, batch.second)]
            self.reference[numbers] = torch.stack(both, 1).cpu()

    def collate(self, numbers: Sequence[int]) -> PreferenceBatch:
        """Some comparisons as a batch."""
        chosen = [self.items[number] for number in numbers]
        first, second = ([getattr(one, side) for one in chosen] for side in ("first", "second"))
        good = torch.tensor([one.good for one in chosen], dtype=torch.bool)
        place = self.device.torch_device
        return PreferenceBatch(
            pad_lessons(first, self.pad, self.device), pad_lessons(second, self.pad, self.device),
            self.reference[list(numbers)].to(place), good.to(place),
        )  # fmt: skip

    def batches(self, rows: int) -> Callable[[int], Iterator[PreferenceBatch]]:
        """The micro-batches of this process, as a function of the step alone: `rows` comparisons a step."""

        def of_step(step: int) -> Iterator[PreferenceBatch]:
            places = np.arange(step * rows, (step + 1) * rows)
            size = len(self.items)
            numbers = [int(permute(np.array([place % size]), size, self.seed, int(place // size))[0]) for place in places]  # fmt: skip
            yield from self.share(numbers)

        return of_step

    def share(self, numbers: Sequence[int]) -> Iterator[PreferenceBatch]:
        """This process's share of some comparisons, in micro-batches; all processes make as many."""
        world = self.device.world_size
        own = np.array_split(np.asarray(numbers), world)[self.device.rank]
        for piece in np.array_split(own, math.ceil(math.ceil(len(numbers) / world) / self.micro_rows)):
            yield self.collate(piece.tolist())

    @torch.no_grad()
    def validate(self, model: Decoder, objective: Objective, most: int, stop: Callable[[], bool]) -> float | None:  # fmt: skip
        """Mean loss of the first comparisons; None when asked to stop meanwhile."""
        model.eval()
        total, weight = 0.0, 0
        for batch in self.share(range(min(most, len(self.items)))):
            if stop():
                return None
            loss, count = objective(model, batch)
            total, weight = total + float(loss), weight + count
        model.train()
        total, count = sum_numbers([total, float(weight)])
        return total / max(1.0, count)
