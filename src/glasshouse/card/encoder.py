"""What the card of an encoder says, where that is not what the card of a decoder says. Reads no files, knows no markup."""

from glasshouse.card.facts import Facts, part
from glasshouse.card.model import limits
from glasshouse.card.page import Block, Code, Heading, Listing, Paragraph
from glasshouse.card.quantity import count, decimal, number_of, scaled
from glasshouse.card.reports import state_of
from glasshouse.card.training import cost, course, data, making

TRANSFORMERS = """
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder)
tokens = tokenizer(f"The cat{{tokenizer.mask_token}} the dog.", return_tensors="pt")
place = (tokens["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
with torch.no_grad():
    print(tokenizer.decode(model(**tokens).logits[0, place].argmax()))
""".strip()
WARNINGS = (
    "It fills gaps in the manner of what it was trained on, whether or not that is true.",
    "Its vectors are of little use as they are: train a head, or train them by contrast, on the task at hand.",
)


def encoder_sections(facts: Facts) -> list[Block]:
    """The card of an encoder."""
    return [*state_of(facts), *_summary(facts), *_use(facts), *_results(facts), *course(facts), *data(facts),
            *making(facts), *cost(facts), *limits(facts, WARNINGS)]  # fmt: skip


def _summary(facts: Facts) -> list[Block]:
    shape, train = facts.shape, part(facts.corpus, "splits", "train")
    weights = number_of(facts.run.get("parameters", part(facts.run, "predicted").get("parameters")))
    size = "an unknown number of" if weights is None else count(weights)
    languages = ", ".join(facts.languages) or "und"
    text = f"{scaled(train.get('bytes'), 'B')} of text ({languages})" if train else "text"
    english = (
        f"An encoder with {size} weights ({count(shape.get('num_layers'))} layers, width {count(shape.get('embedding_dim'))}), "
        f"pretrained from scratch on {text} to guess hidden tokens. It reads, and does not write."
    )
    chinese = (
        f"中文简介：这是一个从零预训练的编码器模型，参数量 {size}，训练目标是猜出被遮住的词元。它只会阅读，不会续写。"
        "偏见、训练文本泄露均未测量。"
    )
    return [Paragraph(english), Paragraph(chinese, "", "zh")]


def _use(facts: Facts) -> list[Block]:
    return [
        Heading("How to use it"),
        Paragraph("With transformers:"),
        Listing(TRANSFORMERS.format(folder=f"{facts.place}/model"), "python"),
    ]


def _results(facts: Facts) -> list[Block]:
    hidden, unit = number_of(facts.settings.get("mask_share")), facts.settings.get("mask_unit", "token")
    head, guessing = Heading("How well it guesses"), number_of(facts.shape.get("vocab_size"))
    if not facts.best:
        return [head, Paragraph("Not measured yet: no validation was made.")]
    share = "a share" if hidden is None else f"{hidden:.0%}"
    said = (
        f"On held-out text, with {share} of the tokens hidden (by the {unit}, the same ones every time), a guess costs "
        f"{decimal(facts.best.get('validation_loss'))} nats"
    )
    nothing = f"; knowing nothing costs the logarithm of {guessing:,.0f} tokens" if guessing else ""
    remark = (
        "At most 64 rows, in training, at the best step. It knows the text on both sides of a gap, so this is no bits per "
        "byte and compares with no decoder's figure; nor with another vocabulary's or another way of hiding."
    )
    return [
        head,
        Paragraph(f"{said}{nothing}."),
        Paragraph(("loss = ", Code("validation_loss"), ". ", remark), "soft"),
    ]
