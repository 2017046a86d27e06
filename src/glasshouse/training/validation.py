"""What a model does on text it was not trained on, while it trains; and how batches of a corpus reach the device."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.inference.engine import generate
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder
from glasshouse.text.packing import Batch, Split, batch, take_rows
from glasshouse.text.tokenizer import Tokenizer
from glasshouse.training.distributed import sum_numbers
from glasshouse.training.objectives import TokenBatch, objective_for
from glasshouse.training.plan import Shape

Hide = Callable[[Batch, int], Batch]
"""From the rows of a step and its number to the same with tokens hidden, which the labels then name."""

VALIDATION_ROWS = 64
SAMPLE_TOKENS = 60


def to_device(rows: Batch, device: Device, isolate: bool) -> TokenBatch:
    """Rows of a corpus as tensors on the device; without isolation a row is one document."""
    tokens, labels, positions, documents = (
        torch.from_numpy(array).to(device.torch_device, non_blocking=True)
        for array in (rows.tokens, rows.labels, rows.positions, rows.documents)
    )
    if not isolate:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TokenBatch(tokens, labels, positions, documents if isolate else None)


def micro_batches(
    split: Split, shape: Shape, device: Device, isolate: bool, hide: Hide | None = None
) -> Callable[[int], Iterator[TokenBatch]]:
    """The micro-batches of this process, as a function of the step alone.

    What is hidden is decided for all rows of a step at once, so it does not depend on how they are shared out. Every
    process takes its share of the step's rows; shares may differ by one row, which summed losses allow.
    """

    def batches(step: int) -> Iterator[TokenBatch]:
        rows = batch(split, step, shape.rows, shape.context, device.seed)
        rows = rows if hide is None else hide(rows, step)
        own = np.array_split(np.arange(shape.rows), device.world_size)[device.rank]
        for piece in np.array_split(own, most_pieces(shape, device.world_size)):
            yield to_device(
                take_rows(rows, int(piece[0]), int(piece[-1]) + 1) if len(piece) else take_rows(rows, 0, 0),
                device,
                isolate,
            )

    return batches


def most_pieces(shape: Shape, world_size: int) -> int:
    """Micro-batches of the process with the most rows: all processes make as many, so that they stay in step."""
    share = -(-shape.rows // world_size)
    return -(-share // shape.micro_rows)


@torch.no_grad()
def validate(
    model: nn.Module,
    split: Split,
    shape: Shape,
    device: Device,
    isolate: bool,
    stop: Callable[[], bool],
    hide: Hide | None = None,
) -> float | None:
    """Mean loss, in nats per token, on the same rows every time; None when asked to stop before the end.

    With `hide`, of the tokens that it hides in step 0.

    Raises:
        InputError: the split has no row of this length.
    """
    model.eval()
    rows = min(VALIDATION_ROWS, max(1, split.tokens // (shape.context + 1)))
    fixed = batch(split, 0, rows, shape.context, 0)
    fixed = fixed if hide is None else hide(fixed, 0)
    objective = objective_for(shape.model)
    loss_sum, weight = 0.0, 0
    own = np.array_split(np.arange(rows), device.world_size)[device.rank]
    for piece in np.array_split(own, max(1, -(-rows // device.world_size // shape.micro_rows))):
        if stop():
            return None
        if len(piece):
            loss, count = objective(
                model, to_device(take_rows(fixed, int(piece[0]), int(piece[-1]) + 1), device, isolate)
            )
            loss_sum, weight = loss_sum + float(loss), weight + count
    loss_sum, total = sum_numbers([loss_sum, float(weight)])
    model.train()
    if total == 0:
        raise InputError("the validation split has nothing to predict", "corpus", "prepare it with more text")
    return loss_sum / total


def sample_text(model: Decoder, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """What the model writes after a prompt, as it comes."""
    config = GenerationConfig(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
    model.eval()
    text = "".join(token.text for token in generate(model, tokenizer, tokenizer.prompt(prompt), config))
    model.train()
    return text
