"""How the decoder's weights are named on disk: the tensor names of Hugging Face's families, both ways.

One table per layout maps our module names to theirs; GPT-2 alone also fuses and transposes its matrices. A tensor is
renamed, cut or joined here, at the file boundary, and nowhere else. Pure: names and tensors; knows no files.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.models.decoder import DecoderConfig
from glasshouse.models.huggingface_config import family_for

LLAMA_MODULES = {
    "embedding": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.query": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.key": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.value": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.query_norm": "model.layers.N.self_attn.q_norm",
    "layers.N.attention.key_norm": "model.layers.N.self_attn.k_norm",
    "layers.N.attention.output": "model.layers.N.self_attn.o_proj",
    "layers.N.feed_forward_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.gate": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.up": "model.layers.N.mlp.up_proj",
    "layers.N.feed_forward.down": "model.layers.N.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GPT2_MODULES = {  # three modules with one name on disk are stored as one, in this order
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "layers.N.attention_norm": "transformer.h.N.ln_1",
    "layers.N.attention.query": "transformer.h.N.attn.c_attn",
    "layers.N.attention.key": "transformer.h.N.attn.c_attn",
    "layers.N.attention.value": "transformer.h.N.attn.c_attn",
    "layers.N.attention.output": "transformer.h.N.attn.c_proj",
    "layers.N.feed_forward_norm": "transformer.h.N.ln_2",
    "layers.N.feed_forward.up": "transformer.h.N.mlp.c_fc",
    "layers.N.feed_forward.down": "transformer.h.N.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


@dataclass(frozen=True)
class Layout:
    """How the tensors of a family are named and laid out on disk.

    Args:
        modules: our module names to those on disk; N stands for the number of the layer.
        prefix: what a file saved without its language-modelling head leaves out of every name.
        transposed: a pattern for the tensors that are stored transposed.
        constant: a pattern for stored tensors that are no weights (masks, frequencies): computed here, never read.
    """

    modules: Mapping[str, str]
    prefix: str
    transposed: str
    constant: str


LLAMA = Layout(LLAMA_MODULES, "model.", r"(?!)", r"\.rotary_emb\.inv_freq$")
GPT2 = Layout(
    GPT2_MODULES, "transformer.", r"\.(c_attn|c_proj|c_fc)\.weight$", r"\.attn\.(bias|masked_bias)$"
)


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Args:
        parts: our names of the tensors it holds, one after another along their first dimension.
        transposed: whether rows and columns are exchanged on disk (GPT-2's Conv1D).
    """

    parts: tuple[str, ...]
    transposed: bool

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensors to the one on disk; a view of ours where nothing has to move."""
        parts = [tensors[name] for name in self.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.t() if self.transposed else whole

    def split(self, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensor on disk to ours, given our shapes; views of it where nothing has to move."""
        whole = tensor.t() if self.transposed else tensor
        pieces = whole.split([shapes[name][0] for name in self.parts])
        return dict(zip(self.parts, pieces, strict=True))

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape on disk, given our shapes."""
        whole = (sum(shapes[name][0] for name in self.parts), *shapes[self.parts[0]][1:])
        return whole[::-1] if self.transposed else whole


def layout_for(config: DecoderConfig) -> Layout:
    """The layout of the family that holds this decoder on disk."""
    return GPT2 if family_for(config) == "gpt2" else LLAMA


def stored_tensors(config: DecoderConfig, names: Iterable[str]) -> dict[str, Stored]:
    """The tensors on disk, by name, that hold a decoder's.

    Args:
        config: the decoder's shape.
        names: the names in its `state_dict`. A tied head is not among them, and so is not on disk.

    Raises:
        InputError: the family has no place for one of them.
    """
    layout = layout_for(config)
    order = {module: index for index, module in enumerate(layout.modules)}
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        layer = re.match(r"layers\.(\d+)\.", module)
        template = module.replace(f"layers.{layer[1]}.", "layers.N.", 1) if layer else module
        if template not in layout.modules:
            raise InputError(
                f"the {family_for(config)} layout has no place for a tensor",
                name,
                "save it as another family",
            )
        stored = (
            layout.modules[template].replace(".N.", f".{layer[1]}.") if layer else layout.modules[template]
        )
        parts.setdefault(f"{stored}.{kind}", []).append((order[template], name))
    return {
        stored: Stored(
            tuple(name for _, name in sorted(found)), re.search(layout.transposed, stored) is not None
        )
        for stored, found in parts.items()
    }


def canonical_name(config: DecoderConfig, name: str) -> str | None:
    """The full name of a stored tensor, whether or not the file left the family's prefix out; None for a constant."""
    layout = layout_for(config)
    if re.search(layout.constant, name):
        return None
    return name if name.startswith((layout.prefix, "lm_head.")) else layout.prefix + name
