"""Where the package's data folders are: in the installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Return the folder ``csrc`` or ``weights``.

    A wheel holds both inside the package; an editable install leaves them beside it (setuptools issue 4248).

    Raises:
        FileNotFoundError: If neither place has the folder.
    """
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"{name}/ is neither in {_PACKAGE} nor in {_PACKAGE.parent}; reinstall ddfup")
