"""What kind of model a run made, in the words a card needs: what it is, what it does, how it is used. Reads no files."""

from dataclasses import dataclass

from glasshouse.card.facts import Facts, part
from glasshouse.card.quantity import count

GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("{prompt}", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.8)
print(tokenizer.decode(written[0], skip_special_tokens=True))
""".strip()
ANSWER = """
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{{"role": "user", "content": "{prompt}"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
written = model.generate(**prompt, max_new_tokens=60)
print(tokenizer.decode(written[0], skip_special_tokens=True))
""".strip()
TRANSLATE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
source = tokenizer("{prompt}", return_tensors="pt")
written = model.generate(input_ids=source["input_ids"], num_beams=4, max_new_tokens=60)
print(tokenizer.decode(written[0], skip_special_tokens=True))
""".strip()


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Args:
        english: what it is; where it comes from; what it does and does not do.
        chinese: what it is and where it comes from; what it does and does not do.
        command: the shell line that uses it.
        program: the Python that uses it without Glasshouse.
        task: the hub's name of what it is for.
        tags: the hub's tags.
        warning: what a reader must expect of it.
        measure: the shell line that measures it.
    """

    english: tuple[str, str, str]
    chinese: tuple[str, str]
    command: str
    program: str
    task: str
    tags: tuple[str, ...]
    warning: str
    measure: str = "glasshouse evaluate {place}"


def kind_of(facts: Facts) -> Kind:
    """The kind of model that a run made, an encoder excepted."""
    if "num_encoder_layers" in part(facts.run, "model_shape"):
        return Kind(
            ("An encoder-decoder", "trained from scratch on pairs of texts", "It writes one side of a pair from the other, in one direction."),
            ("从零训练的编码器-解码器模型", "它只会把一边的句子写成另一边，只有一个方向。"),
            'glasshouse translate {place} "{prompt}"', TRANSLATE, "translation", ("sequence-to-sequence", "from-scratch"),
            "It translates in the manner of the pairs it was trained on; what is unlike them it makes up.",
            "glasshouse translate {place} --file SOURCES --references TARGETS",
        )  # fmt: skip
    if facts.run.get("stage") == "finetune":
        examples, base = (
            count(part(facts.run, "examples").get("kept")),
            str(facts.run.get("base") or "another model"),
        )
        name = base.rstrip("/").rpartition("/")[2] or base
        return Kind(
            ("A decoder-only language model", f"fine-tuned ({facts.run.get('method')}) from {name} on {examples} examples",
             "It answers in the manner of those examples."),
            (f"在 {name} 的基础上用 {examples} 个例子微调（{facts.run.get('method')}）的解码器语言模型", "它照着那些例子的样子回答。"),
            'glasshouse chat {place}', ANSWER, "text-generation", ("causal-lm", "fine-tuned"),
            "It answers in the manner of its examples. It states false things as easily as true ones.",
        )  # fmt: skip
    return Kind(
        ("A decoder-only language model", "pretrained from scratch", "It continues text; it has not been trained to follow instructions."),
        ("从零预训练的解码器语言模型", "它只会续写文本，没有经过指令训练。"),
        'glasshouse generate {place} "{prompt}" --max_new_tokens 60 --temperature 0.8 --seed 1', GENERATE,
        "text-generation", ("causal-lm", "from-scratch"),
        "It continues text in the manner of what it was trained on. It states false things as easily as true ones.",
    )  # fmt: skip
