"""A file for the tests of the archive, which change copies of it."""

from pathlib import Path

import pytest
import small_models as models

from truenorm import archive


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model: dense, truenorm's BatchNormalization `bn`, ReLU, dense."""
    path = tmp_path_factory.mktemp("archive") / "model.keras"
    archive.save(models.shake(models.dense("truenorm")), path)
    return path
