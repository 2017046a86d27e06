"""The verb's function: text arrives as it is written, and every way of stopping is clean."""

import io

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.device import open_device
from glasshouse.errors import InputError
from glasshouse.inference.engine import Token
from glasshouse.inference.generate import continue_text, end_tokens, generate_text, write_stream
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
