"""Images for whole runs."""

import pytest
from small_runs import make_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Four classes, 8 training and 3 validation images each: 8 steps of 4 an epoch."""
    return make_images(tmp_path_factory.mktemp("images"), 8, 3)
