"""A model in a file, for all tests of the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_models as models

from truenorm import archive


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, Keras's BatchNormalization, ReLU, dense."""
    path = tmp_path_factory.mktemp("cli") / "model.keras"
    archive.save(models.shake(models.dense()), path)
    return path
