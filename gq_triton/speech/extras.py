"""Imports of optional packages, with an error that says what to install."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str = "speech") -> ModuleType:
    """Import an optional package.

    Args:
        module: import name, such as ``"soundfile"``.
        extra: the gq_triton extra that installs it.

    Raises:
        ModuleNotFoundError: the package is missing; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"{module} is not installed; install it with: pip install 'gq_triton[{extra}]'", name=module
        ) from error
