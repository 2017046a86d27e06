"""Grow a language model you can see through."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshouse.models.decoder import Transformer as Transformer

PUBLIC = {"Transformer": "glasshouse.models.decoder"}
"""What the package exports, and the module it is in: imported when it is asked for, so that `import glasshouse` is quick."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'glasshouse' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
