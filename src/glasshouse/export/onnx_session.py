"""The graphs of an exported model, run by onnxruntime on the CPU: what they say of a text, as rows to compare.

Each graph is asked what it must be able to do: a decoder reads a text in two parts, the second with the keys and values
that the first left; the others are given padding behind the text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.export.library import require_library
from glasshouse.export.onnx_model import MODEL_FILE, SOURCE_FILE, TARGET_FILE
from glasshouse.export.replay import encoder_rows, target_of

PADDED = 3
"""Tokens of padding behind each text."""


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        InputError: onnxruntime is not installed.
    """
    runtime = require_library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class ExportedModel:
    """The graphs of a folder.

    Args:
        folder: where `save_graphs` wrote them.
    """

    def __init__(self, folder: Path):
        self._target = open_session(folder / TARGET_FILE) if (folder / TARGET_FILE).exists() else None
        self._model = open_session(folder / (SOURCE_FILE if self._target else MODEL_FILE))
        self._inputs = {given.name: given.shape for given in self._model.get_inputs()}

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """What `replay.read_rows` gives of the model itself."""
        if self._target is not None:
            return self._target_rows(list(tokens))
        if "attention_mask" in self._inputs:
            return self._encoder_rows(list(tokens))
        return self.decoder_logits(tokens)

    def decoder_logits(self, tokens: Sequence[int], parts: int = 2) -> Tensor:
        """The logits after each token, [T, vocab_size], read in several parts."""
        shapes = list(self._inputs.items())[1:]
        feed: dict[str, Any] = {
            name: np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32) for name, shape in shapes
        }
        found = []
        for part in np.array_split(np.array([tokens], dtype=np.int64), parts, axis=1):
            if part.shape[1]:
                logits, *present = self._model.run(None, feed | {"input_ids": part})
                feed = dict(zip(feed, present, strict=True))
                found.append(torch.from_numpy(logits[0]))
        return torch.cat(found)

    def _padded(self, tokens: list[int]) -> dict[str, np.ndarray]:
        ids = np.array([tokens + [0] * PADDED], dtype=np.int64)
        mask = np.array([[1] * len(tokens) + [0] * PADDED], dtype=np.int64)
        feed = {"input_ids": ids, "attention_mask": mask}
        return feed | ({"token_type_ids": np.zeros_like(ids)} if "token_type_ids" in self._inputs else {})

    def _encoder_rows(self, tokens: list[int]) -> Tensor:
        hidden, *scores = (torch.from_numpy(one[0]) for one in self._model.run(None, self._padded(tokens)))
        score = scores[0] if scores else None
        if score is not None and score.dim() == 2:
            score = score[: len(tokens)]
        return encoder_rows(hidden[: len(tokens)], score)

    def _target_rows(self, tokens: list[int]) -> Tensor:
        assert self._target is not None
        source = self._padded(tokens)
        [memory] = self._model.run(None, source)
        feed = {"input_ids": np.array([target_of(tokens)], dtype=np.int64), "encoder_hidden_states": memory}
        [logits] = self._target.run(None, feed | {"encoder_attention_mask": source["attention_mask"]})
        return torch.from_numpy(logits[0])
