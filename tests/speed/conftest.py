"""A small network in a file, for child processes too."""

import pytest
from networks import tiny_pyramid

from ddfup import models


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="tiny", description="a test")
    return path
