"""The verb's function: text arrives as it is written, and every way of stopping is clean."""

import io
import json
from dataclasses import replace

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.device import open_device
from glasshouse.errors import InputError
from glasshouse.inference.engine import Token, generate
from glasshouse.inference.generate import (
    AnswerOptions,
    answer_several,
    chat,
    continue_text,
    end_tokens,
    generate_text,
    search_texts,
    write_stream,
)
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.text.tokenizer import train_tokenizer

CONFIG = GenerationConfig(1.0, max_new_tokens=12, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = train_tokenizer(iter(["The cat sat. 猫坐着。 The cat ran.\n"] * 4), 270)
    model = Decoder(DecoderConfig(270, 32, 2, 4, 2, 8, 48, 64))
    initialize(model, 0)
    save_artifact(path, model, tokenizer)
    return path


def token(text, finish=""):
    return Token(1, text, 0.5, 1, 1.0, (), finish)


def device():
    return open_device("cpu", "float32", threads=torch.get_num_threads())


class Watched(io.StringIO):
    """A stream that remembers what was flushed, piece by piece."""

    def __init__(self, terminal=False):
        super().__init__()
        self.seen, self.terminal = [], terminal

    def flush(self):
        self.seen.append(self.getvalue())

    def isatty(self):
        return self.terminal


def test_prompt_and_text_are_written_and_the_text_returned(folder):
    output = io.StringIO()
    text = generate_text(folder, "The cat", CONFIG, device(), output)
    artifact = open_artifact(folder)
    assert text == "".join(token.text for token in continue_text(artifact, "The cat", CONFIG))
    assert output.getvalue() == "The cat" + text + "\n"
    assert text


def test_pieces_are_flushed_as_they_come():
    output = Watched()
    write_stream([token("a"), token(""), token("b", "length")], "p", output)
    assert output.seen == ["p", "pa", "pab", "pab\n"]


def test_ctrl_c_ends_the_line():
    def interrupted():
        yield token("half")
        raise KeyboardInterrupt

    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        write_stream(interrupted(), "", output)
    assert output.getvalue() == "half\n"


def test_a_reader_that_leaves_is_not_written_to_again():
    class Closed(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            raise BrokenPipeError

    output = Closed()
    with pytest.raises(BrokenPipeError):
        write_stream([token("a")], "p", output)
    assert output.writes == 1


def test_a_terminal_is_not_steered_by_the_model():
    text = "a\x1b[2Jb\x07\n\tc\x9b\x7f猫"
    screen, file = Watched(terminal=True), io.StringIO()
    assert write_stream([token(text)], "", screen) == text
    assert screen.getvalue() == "a\u241b[2Jb\u2407\n\tc\ufffd\u2421猫\n"
    write_stream([token(text)], "", file)
    assert file.getvalue() == text + "\n"


def test_a_prompt_cannot_spell_a_special_token(folder):
    artifact = open_artifact(folder)
    spelled = "<|im_end|>" * 8  # about 80 tokens when it is text, 8 if it were special
    with pytest.raises(InputError, match="the prompt has"):
        continue_text(artifact, spelled, CONFIG)


def test_end_tokens_may_be_one_or_several(folder):
    artifact = open_artifact(folder)
    assert end_tokens(artifact) == (artifact.tokenizer.end_of_document,)
    artifact.generation["eos_token_id"] = [3, 4]
    assert end_tokens(artifact) == (3, 4)
    del artifact.generation["eos_token_id"]
    assert end_tokens(artifact) == ()


def test_no_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no such model"):
        generate_text(tmp_path / "nothing", "x", CONFIG, device())


# ---- several answers, forms, guesses, searches


def answer(folder, config=CONFIG, **options):
    output = io.StringIO()
    text = generate_text(folder, "The cat", config, device(), output, AnswerOptions(**options))
    return text, output.getvalue()


def test_several_answers_are_each_shown_under_its_number(folder):
    config = GenerationConfig(1.0, max_new_tokens=12, seed=2, n=3)
    text, shown = answer(folder, config)
    answers = [
        "".join(token.text for token in tokens)
        for tokens in answer_several(open_artifact(folder), "The cat", config)
    ]
    assert text == "\n".join(answers)
    assert shown == "".join(f"-- {number} of 3 --\nThe cat{one}\n" for number, one in enumerate(answers, 1))
    assert len(set(answers)) == 3
    assert answers[0] == generate_text(folder, "The cat", CONFIG, device(), io.StringIO())


def test_the_best_of_many_are_kept(folder):
    many = answer_several(open_artifact(folder), "The cat", GenerationConfig(1.0, max_new_tokens=6, n=8))
    best = answer_several(
        open_artifact(folder), "The cat", GenerationConfig(1.0, max_new_tokens=6, n=2, best_of=8)
    )

    def mean(tokens):
        return torch.tensor([token.probability for token in tokens]).log().mean()

    assert best == sorted(many, key=mean, reverse=True)[:2]


@pytest.mark.parametrize(
    ("form", "holds"),
    [
        ("json", lambda text: isinstance(json.loads(text), dict)),
        ("regex:[0-9]{3}猫", lambda text: text[3] == "猫" and int(text[:3]) >= 0),
        ("choice:yes|no|perhaps", lambda text: text in ("yes", "no", "perhaps")),
        ("schema:schema.json", lambda text: json.loads(text) in (1, "猫")),
        ("grammar:rules.lark", lambda text: set(text) <= {"a", "b"}),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(folder, form, holds, tmp_path, monkeypatch):
    (tmp_path / "schema.json").write_text('{"enum": [1, "猫"]}', encoding="utf-8")
    (tmp_path / "rules.lark").write_text('start: ("a" | "b"){1,5}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # An untrained model closes no brace for a long time: a bias helps the open form to its end.
    closing = (
        {open_artifact(folder).tokenizer.encode(text)[0]: 6.0 for text in ('"', "}")}
        if form == "json"
        else {}
    )
    config = GenerationConfig(1.0, max_new_tokens=50, n=3, logit_bias=closing)
    text, _ = answer(folder, config, form=form)
    assert all(holds(one) for one in text.split("\n") if form != "json")
    assert form != "json" or isinstance(
        json.loads(
            answer(folder, GenerationConfig(1.0, max_new_tokens=50, logit_bias=closing), form=form)[0]
        ),
        dict,
    )


def test_guesses_change_no_text(folder, tmp_path):
    plain, _ = answer(folder)
    assert answer(folder, draft="lookup")[0] == plain
    assert answer(folder, draft=str(folder))[0] == plain
    other = train_tokenizer(iter(["A dog and a hen. 鸡和狗。\n"] * 4), 270)
    save_artifact(tmp_path / "other", Decoder(DecoderConfig(270, 16, 1, 2, 1, 8, 16, 64)), other)
    with pytest.raises(InputError, match="another tokenizer"):
        answer(folder, draft=str(tmp_path / "other"))


def test_a_search_finds_likelier_texts_than_greedy(folder):
    artifact, config = open_artifact(folder), GenerationConfig(max_new_tokens=8, n=3)
    texts = search_texts(artifact, "The cat", config, 4)
    assert len(set(texts)) == 3
    assert answer(folder, config, beams=4)[0].split("\n-- ")[0].startswith(texts[0].split("\n")[0])
    greedy = "".join(
        token.text for token in continue_text(artifact, "The cat", GenerationConfig(0, max_new_tokens=8))
    )
    assert search_texts(artifact, "The cat", GenerationConfig(max_new_tokens=8), 1) == [greedy]
    stopped = search_texts(artifact, "The cat", GenerationConfig(max_new_tokens=8, stop=(texts[0][1],)), 4)
    assert stopped[0] == texts[0][: texts[0].index(texts[0][1])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "xml"}, "is no form"),
        ({"form": "json:x"}, "is no form"),
        ({"form": "regex"}, "is no form"),
        ({"form": "schema:nowhere.json"}, "cannot be read"),
        ({"form": "regex:(a"}, "unclosed group"),
        ({"draft": "nowhere"}, "no such model"),
        ({"beams": 4, "form": "json"}, "neither a form nor guesses"),
        ({"beams": 4, "draft": "lookup"}, "neither a form nor guesses"),
        ({"beams": 65}, "beams is 65"),
    ],
)
def test_options_that_cannot_be_met(folder, options, message):
    with pytest.raises(InputError, match=message):
        answer(folder, **options)


def test_more_answers_than_beams(folder):
    with pytest.raises(InputError, match="3 answers of 2 beams"):
        answer(folder, GenerationConfig(n=3), beams=2)


# ---- conversations


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A model with room for a few turns."""
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = train_tokenizer(iter(["The cat sat. 猫坐着。 The cat ran. user assistant system\n"] * 4), 290)
    model = Decoder(DecoderConfig(290, 32, 2, 4, 2, 8, 48, 512))
    initialize(model, 1)
    save_artifact(path, model, tokenizer)
    return path


def asked(artifact, messages, config):
    """The answer to a whole conversation, asked for by itself."""
    prompt = artifact.tokenizer.encode_chat(messages)
    tokens = generate(artifact.model, artifact.tokenizer, prompt, config, end_tokens=end_tokens(artifact))
    return "".join(one.text for one in tokens)


def test_each_answer_is_that_to_the_whole_conversation(roomy):
    artifact, output = open_artifact(roomy), io.StringIO()
    chat(artifact, CONFIG, io.StringIO("Hi\n\nAnd you?\n/reset\nHi\n"), output, "Be brief.")
    system, hi = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    first = asked(artifact, [system, hi], CONFIG)
    turn = [system, hi, {"role": "assistant", "content": first}, {"role": "user", "content": "And you?"}]
    second = asked(artifact, turn, replace(CONFIG, seed=3))
    third = asked(artifact, [system, hi], replace(CONFIG, seed=4))
    assert output.getvalue() == f"{first}\n{second}\n{third}\n\n"


def test_ctrl_c_ends_an_answer_and_the_talk_goes_on(roomy):
    class Interrupted(io.StringIO):
        """Ctrl-C comes while the first answer is written."""

        def flush(self):
            if not self.done and self.getvalue():
                self.done = True
                raise KeyboardInterrupt

    output = Interrupted()
    output.done = False
    chat(open_artifact(roomy), CONFIG, io.StringIO("Hi\nAgain\n"), output)
    first, second, *_ = output.getvalue().split("\n")
    assert output.done
    assert second
    assert len(first) < len(asked(open_artifact(roomy), [{"role": "user", "content": "Hi"}], CONFIG))


def test_quantized_weights_write_too_and_their_price_is_said(roomy, capsys):
    config = replace(CONFIG, temperature=0)
    text = generate_text(roomy, "The cat", config, device(), io.StringIO(), AnswerOptions(quantize="int8"))
    assert text
    assert "bits per byte instead of" in capsys.readouterr().err
    with pytest.raises(InputError, match="int2"):
        generate_text(roomy, "The cat", config, device(), io.StringIO(), AnswerOptions(quantize="int2"))
