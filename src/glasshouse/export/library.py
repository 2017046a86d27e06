"""Libraries that only an export needs, imported when it does. Knows nothing of what is exported."""

from importlib import import_module
from typing import Any

from glasshouse.errors import InputError


def require_library(name: str) -> Any:
    """Import a library of the extra `export`, or say in one line how to install it.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} is needed to export: {error}", "", 'in the project folder, pip install ".[export]"'
        ) from None
