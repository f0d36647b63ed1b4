"""Every promise in its short form; `python -m tests.torture` is the long one."""

import pytest

from torture.promises import PROMISES, keep
from torture.table import SHORT


@pytest.mark.parametrize("name", PROMISES)
def test_promise(tmp_path, name):
    lines = list(keep(name, SHORT, tmp_path / "trial"))
    assert lines
    for line in lines:
        assert line.passed is not False, f"{line.done}: {line.figure}\n" + "\n".join(line.details[:5])
    owed = [line.figure for line in lines if line.passed is None]
    if owed and len(owed) == len(lines):
        pytest.skip("; ".join(owed))
