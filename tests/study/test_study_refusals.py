"""What a study refuses before its first trial, and what it tells of the data and the model."""

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from test_study import POSITIONS, arrays, build, run

from truenorm._errors import (
    DataError,
    MissingDependencyError,
    ModelError,
    OptionError,
    OutputError,
)
from truenorm._study.checks import check_momentum, check_placement

pytestmark = pytest.mark.any_backend
X, Y = arrays()[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            (X, Y, X),
            "The data is not two pairs of arrays (at 'data'). Expected: ((x_train, y_train), "
            "(x_val, y_val)). Received: tuple. Remedy: give the training pair and the validation "
            "pair.",
        ),
        (
            ((X, Y), (X, Y[:3])),
            "The validation inputs and targets have different lengths (at 'data'). Expected: one "
            "target per sample. Received: 60 inputs, 3 targets. Remedy: cut them to the same "
            "samples.",
        ),
        (((X, Y), (X[:0], Y[:0])), "This array is empty (at 'data: x_val')."),
        (((X.tolist(), Y), (X, Y)), "This is not a NumPy array (at 'data: x_train')."),
        (((X, Y.astype(object)), (X, Y)), "This array does not hold real numbers (at"),
        (((X, Y), (X * np.nan, Y)), "This array has NaN or infinity in it (at 'data: x_val')."),
        (((X, Y), (X[:, :4], Y)), "The training and validation inputs have different shapes"),
        (((X[:, :4], Y), (X[:, :4], Y)), "The data does not fit the model's inputs (at 'data')."),
        (((np.stack([X, X], -1), Y),) * 2, "The data does not fit the model's inputs"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        run(None, data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"positions": ("none",)},
            "A study compares two or more positions (at 'positions'). Expected: a sequence of "
            "different positions. Received: ('none',). Remedy: for example ('before_activation', "
            "'after_activation').",
        ),
        ({"positions": "none"}, "A study compares two or more positions"),
        ({"positions": ("none", "none")}, "A study compares two or more positions"),
        ({"positions": ("none", "elsewhere")}, "There is no such position"),
        ({"seeds": 0}, "seeds must be a positive integer. Received: 0."),
        ({"seeds": (1, 1)}, "seeds must be a positive integer, or different integers from 0 to"),
        ({"seeds": ()}, "seeds must be a positive integer, or different integers from 0 to"),
        ({"seeds": (2**32,)}, "seeds must be a positive integer, or different integers from 0 to"),
        ({"seeds": (-1,)}, "every seed must be 0 or a positive integer. Received: -1."),
        ({"seeds": True}, "seeds must be a positive integer. Received: True."),
        ({"epochs": 0}, "epochs must be a positive integer. Received: 0."),
        ({"batch_size": 2.5}, "batch_size must be a positive integer. Received: 2.5."),
        ({"workers": 0}, "workers must be a positive integer. Received: 0."),
        ({"timeout": -1}, "timeout must be a positive number of seconds, or None for no limit."),
        ({"backend": "numpy"}, "This backend cannot train models"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}"):
        run(None, **options)


def plain_model(*, compiled: bool) -> Any:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, activation="softmax")])
    if compiled:
        model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def test_models_that_cannot_be_studied(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^The function did not build a compiled model"):
        run(tmp_path, build=lambda: plain_model(compiled=False))
    with pytest.raises(ModelError, match=r"^The function did not build a compiled model"):
        run(tmp_path, build=lambda: None)
    with pytest.raises(ModelError, match=r"^This model has no BatchNormalization"):
        run(tmp_path, build=lambda: plain_model(compiled=True))
    assert list(tmp_path.iterdir()) == []


def test_sites_that_cannot_be_placed_are_told_or_refused() -> None:
    source = keras.Input((5,))
    lonely = keras.layers.BatchNormalization(name="lonely")(source)
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(4)(lonely))
    end = keras.layers.Dense(2)(keras.layers.ReLU()(hidden))
    assert check_placement(keras.Model(source, end), ("none", *POSITIONS)) == tuple(
        f"At {p}, 1 BatchNormalization site could not be placed, and nothing is changed there: "
        "lonely."
        for p in POSITIONS
    )
    only = keras.Model(source, keras.layers.Dense(2)(lonely))
    with pytest.raises(ModelError, match=r"^No BatchNormalization of this model can be put at"):
        check_placement(only, POSITIONS)


def test_moving_statistics_that_cannot_be_true_are_told() -> None:
    model = build()  # momentum 0.99
    assert check_momentum(model, 459) == ()
    assert check_momentum(model, 180) == (
        "Caution: after 180 steps with momentum 0.99, 16% of the moving statistics are still their "
        "initial values, and validation is measured with them. This, not the position, may decide "
        "against BatchNormalization: build the model with momentum 0.97 or less, or train longer.",
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^The study's folder cannot be written"):
        run(tmp_path / "file" / "folder")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError) as caught:
        run(None)
    assert str(caught.value) == (
        "The study needs scipy, which is not installed. Remedy: pip install 'truenorm[study]'."
    )
