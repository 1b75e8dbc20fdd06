"""A folded model is plain Keras: what is saved and exported needs no truenorm to compute."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import truenorm as tn

L = keras.layers
BACKEND = keras.config.backend()
PIXELS, CLASSES = load_digits(return_X_y=True)
IMAGES = (PIXELS / 16).astype("float32").reshape(-1, 8, 8, 1)
DIGITS = IMAGES[:50]


@pytest.fixture(scope="module")
def original() -> Any:
    """Our layer twice where it folds, and once between an activation and a padded convolution."""
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="digit"),
            L.Conv2D(8, 3, padding="same", use_bias=False),
            tn.BatchNormalization(momentum=0.9),
            L.ReLU(),
            L.Conv2D(8, 3, padding="same"),
            tn.BatchNormalization(momentum=0.9, activation="relu"),
            L.Conv2D(8, 3, padding="same", activation="relu"),
            tn.BatchNormalization(momentum=0.9, name="stays"),
            L.Conv2D(8, 3, padding="same"),
            L.Flatten(),
            L.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(IMAGES, CLASSES, batch_size=64, epochs=2, verbose=0)
    return model


@pytest.fixture(scope="module")
def folded(original: Any) -> Any:
    return tn.fold(original, probe=DIGITS).model


@pytest.fixture(scope="module")
def expected(original: Any) -> np.ndarray:
    """What the model computes before it is folded."""
    outputs = original.predict(DIGITS, verbose=0)
    assert (outputs.argmax(axis=1) == CLASSES[: len(DIGITS)]).mean() > 0.8
    return outputs


def assert_same(outputs: Any, expected: np.ndarray) -> None:
    error = np.abs(np.asarray(outputs) - expected).max() / np.abs(expected).max()
    assert error <= 1e-5


def test_what_is_folded_and_what_stays(original: Any) -> None:
    rewrite = tn.fold(original, probe=DIGITS)
    assert ([site.path for site in rewrite.left], len(rewrite.changed)) == (["stays"], 2)
    classes = {type(layer).__module__.split(".")[0] for layer in rewrite.model.layers}
    assert classes == {"keras"}


WITHOUT_TRUENORM = """
import sys
sys.modules["truenorm"] = None
import keras, numpy
model = keras.models.load_model(sys.argv[1])
model.jit_compile = False  # JAX's files ask for it, and PyTorch compiles for many seconds
numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2]), verbose=0))
"""


@pytest.mark.costly
def test_a_saved_one_loads_where_truenorm_is_not_installed(
    folded: Any, expected: np.ndarray, tmp_path: pathlib.Path
) -> None:
    """What JAX saved, in PyTorch: so it gets to the formats that JAX does not export."""
    env = os.environ | {"KERAS_BACKEND": "torch" if BACKEND == "jax" else BACKEND}
    model, x, y = (str(tmp_path / name) for name in ("model.keras", "x.npy", "y.npy"))
    folded.save(model)
    np.save(x, DIGITS)
    subprocess.run([sys.executable, "-c", WITHOUT_TRUENORM, model, x, y], check=True, env=env)
    assert_same(np.load(y), expected)


# --- exported, and run by another runtime ------------------------------------------------------


def in_tensorflow(folded: Any, path: pathlib.Path) -> Any:
    folded.export(str(path), verbose=False)
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    return loaded.serve(DIGITS)


def in_onnxruntime(folded: Any, path: pathlib.Path) -> Any:
    import onnxruntime

    if BACKEND == "jax":
        pytest.importorskip("jax2onnx")
    file = str(path / "model.onnx")
    folded.export(file, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {session.get_inputs()[0].name: DIGITS})[0]


def in_torch_export(folded: Any, path: pathlib.Path) -> Any:
    import torch

    file = str(path / "model.pt2")
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    folded.export(file, format="torch", verbose=False, dynamic_shapes=batch)
    return torch.export.load(file).module()(torch.tensor(DIGITS)).detach()


def in_litert(folded: Any, path: pathlib.Path) -> Any:
    import tensorflow as tf

    file = str(path / "model.tflite")
    folded.export(file, format="litert", verbose=False)
    interpreter = tf.lite.Interpreter(file)
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], DIGITS.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], DIGITS)
    interpreter.invoke()
    return interpreter.get_tensor(made["index"])


def in_openvino(folded: Any, path: pathlib.Path) -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # it calls home
    openvino = pytest.importorskip("openvino")
    file = str(path / "model.xml")
    folded.export(file, format="openvino", verbose=False)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the processor has it
    return openvino.compile_model(file, "CPU", exact)(DIGITS)[0]


RUNTIMES: dict[str, list[Callable[[Any, pathlib.Path], Any]]] = {
    "jax": [in_tensorflow, in_onnxruntime],
    "tensorflow": [in_tensorflow, in_onnxruntime, in_litert, in_openvino],
    "torch": [in_onnxruntime, in_torch_export, in_openvino],
}


@pytest.mark.parametrize("run", RUNTIMES[BACKEND])
def test_an_exported_one_computes_what_the_original_did(
    folded: Any, expected: np.ndarray, tmp_path: pathlib.Path, run: Callable[..., Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters, about Keras's and their own code
        outputs = run(folded, tmp_path)
    assert_same(outputs, expected)
