"""Data in every form that users have it, as collect reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from small_models import dense, subclassed, two_towers

import truenorm as tn

RANDOM = np.random.default_rng(0)
X, Y, W = (RANDOM.normal(size=shape).astype("float32") for shape in ((10, 5), (10, 3), (10,)))
SMALL, LARGE = (RANDOM.normal(2.0, size=(10, n)).astype("float32") for n in (2, 4))


def two_inputs(form: type = list) -> Any:
    """A model of two inputs whose names are not in the order of the inputs."""
    small, large = keras.Input((2,), name="z_small"), keras.Input((4,), name="a_large")
    joined = keras.layers.Concatenate()([small, large])
    inputs = {"z_small": small, "a_large": large} if form is dict else form([small, large])
    return keras.Model(inputs, keras.layers.BatchNormalization(name="bn")(joined))


def identical_inputs() -> Any:
    """A model of two inputs of the same shape: only their names tell them apart."""
    left, right = keras.Input((2,), name="z"), keras.Input((2,), name="a")
    joined = keras.layers.Concatenate()([left, right])
    return keras.Model([left, right], keras.layers.BatchNormalization(name="bn")(joined))


class Loader:
    """As PyTorch's DataLoader: lists, read again and again."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[list[Any]]:
        for start in range(0, 10, 4):
            yield [part[start : start + 4] for part in self.parts]


class Frame:
    """As pandas's: rows by slices, an array if asked for one, no dtype of its own."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.shape, self.iloc = rows, rows.shape, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Frame:
        return Frame(self.rows[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.rows


class Sequence(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


def mean(model: Any, data: Any, **options: Any) -> np.ndarray:
    """What the first BatchNormalization sees."""
    population = tn.collect(model, data, **options)
    assert population.samples == 10
    assert population.batches == 3
    return next(iter(population.sites.values())).mean


ONE_INPUT: dict[str, Callable[[], Any]] = {
    "array": lambda: X,
    "(x,)": lambda: (X,),
    "(x, y)": lambda: (X, Y),
    "(x, labels in a list)": lambda: (X, [0] * 10),
    "(x, y, w)": lambda: (X, Y, W),
    "batches (x,)": lambda: Loader(X),
    "batches [x, y]": lambda: Loader(X, Y),
    "batches [x, y, w]": lambda: Loader(X, Y, W),
    "batches (x, y)": lambda: [tuple(batch) for batch in Loader(X, Y)],
    "list of arrays": lambda: [X[:4], X[4:8], X[8:]],
    "generator": lambda: (batch for batch in Loader(X, Y)),
    "PyDataset": lambda: Sequence(),
    "by name": lambda: {"x": X},
    "by name, with another column": lambda: {"a": TEXT, "x": X},
    "batches by name, with another column": lambda: [
        ({"a": w, "x": x}, y, w) for x, y, w in Loader(X, Y, W)
    ],
    "one more axis": lambda: X[..., None],
    "frame": lambda: Frame(X),
}


@pytest.mark.parametrize("form", ONE_INPUT)
def test_the_data_of_one_input(form: str) -> None:
    model = keras.Sequential(
        [keras.Input((5,), name="x"), keras.layers.BatchNormalization(name="bn")]
    )
    np.testing.assert_allclose(mean(model, ONE_INPUT[form](), batch_size=4), X.mean(0), atol=1e-6)


def test_pytorchs_own_loader() -> None:
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization(name="bn")])
    for data in (loader, torch.from_numpy(X), (torch.from_numpy(X), torch.from_numpy(Y))):
        np.testing.assert_allclose(mean(model, data, batch_size=4), X.mean(0), atol=1e-6)


def test_tensorflows_own_dataset() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    dataset = tensorflow.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization(name="bn")])
    np.testing.assert_allclose(mean(model, dataset), X.mean(0), atol=1e-6)


NAMED = {"a_large": LARGE, "z_small": SMALL}
TEXT = np.array(["a"] * 10)
MORE = {"b": TEXT, "a": W, **NAMED}
"""With columns that the model does not have, before and between its own."""
TWO_INPUTS: dict[str, Callable[[], Any]] = {
    "[x1, x2]": lambda: [SMALL, LARGE],
    "(x1, x2)": lambda: (SMALL, LARGE),
    "([x1, x2], y)": lambda: ([SMALL, LARGE], Y),
    "((x1, x2), y, w)": lambda: ((SMALL, LARGE), Y, W),
    "by name": lambda: NAMED,
    "(by name, y)": lambda: (NAMED, Y),
    "batches [x1, x2]": lambda: Loader(SMALL, LARGE),
    "batches ([x1, x2], y)": lambda: [([a, b], y) for a, b, y in Loader(SMALL, LARGE, Y)],
    "batches (by name, y)": lambda: [
        ({"a_large": b, "z_small": a}, y) for a, b, y in Loader(SMALL, LARGE, Y)
    ],
    "by name, with other columns": lambda: MORE,
    "(by name, with other columns, y, w)": lambda: (MORE, Y, W),
    "batches by name, with other columns": lambda: [
        ({"a": w, "a_large": b, "z_small": a}, y, w) for a, b, y, w in Loader(SMALL, LARGE, Y, W)
    ],
}


@pytest.mark.parametrize("form", TWO_INPUTS)
def test_the_data_of_two_inputs(form: str) -> None:
    expected = np.concatenate([SMALL, LARGE], axis=1).mean(0)
    found = mean(two_inputs(), TWO_INPUTS[form](), batch_size=4)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_names_decide_where_shapes_do_not() -> None:
    data = {"a": SMALL + 10, "z": SMALL}
    expected = np.concatenate([SMALL, SMALL + 10], axis=1).mean(0)
    np.testing.assert_allclose(mean(identical_inputs(), data, batch_size=4), expected, atol=1e-5)
    predicted = identical_inputs().predict(data, verbose=0)  # Keras decides by the names as well
    np.testing.assert_allclose(predicted[:, :2] * np.sqrt(1.001), SMALL, rtol=1e-4)


def test_the_inputs_of_a_dict_are_a_dict() -> None:
    x = RANDOM.normal(size=(10, 6, 6, 3)).astype("float32")
    both = tn.collect(two_towers(), ({"left": x, "right": x}, Y), batch_size=4)
    assert both.samples == 10
    expected = np.concatenate([SMALL, LARGE], axis=1).mean(0)
    for data in (NAMED, MORE, (MORE, Y, W)):
        found = mean(two_inputs(dict), data, batch_size=np.int64(4))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_subclassed_model_takes_the_first_of_a_batch() -> None:
    x = X[:, :3]
    for data in (x, (x, Y), Loader(x, Y), [x[:4], x[4:8], x[8:]]):
        np.testing.assert_allclose(mean(subclassed(), data, batch_size=4), x.mean(0), atol=1e-6)


@pytest.mark.parametrize("form", [list, tuple])
def test_a_subclassed_model_that_was_built_with_several_arrays_takes_several(form: type) -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn = keras.layers.BatchNormalization(name="bn")

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.bn(keras.ops.concatenate(list(x), axis=1), training=training)

    model = Own()
    model(form([SMALL, LARGE]))
    expected = np.concatenate([SMALL, LARGE], axis=1).mean(0)
    for data in (form([SMALL, LARGE]), (form([SMALL, LARGE]), Y), [(form([SMALL, LARGE]), Y, W)]):
        population = tn.collect(model, data)
        np.testing.assert_allclose(population.sites["bn"].mean, expected, atol=1e-6)


@pytest.mark.parametrize("form", [list, dict])
def test_every_tool_leaves_out_the_columns_that_the_model_does_not_have(form: type) -> None:
    """As fit does (which warns where the inputs are a dict)."""
    model = two_inputs(form)
    model = keras.Model(model.input, keras.layers.Dense(3)(model.output))
    data = {**NAMED, "z_weight": W}
    model.compile("sgd", "mse")
    if form is list:
        callback = tn.callbacks.Recalibrate(data, batch_size=4)
        model.fit(data, Y, sample_weight=W, batch_size=4, verbose=0, callbacks=[callback])
        assert callback.last is not None
    assert tn.recalibrate(model, (data, Y, W), batch_size=4).population.samples == 10
    assert tn.inspect(model, data, Y).modes["predict"][0].statistics == "moving"
    assert not tn.diagnose(model, (data, Y, W), batch_size=4, select=["TN101"]).findings


def test_a_model_of_a_fixed_batch_size_reads_all_samples() -> None:
    model = keras.Sequential(
        [keras.Input((5,), batch_size=4), keras.layers.BatchNormalization(name="bn")]
    )
    population = tn.collect(model, X[:8], batch_size=4)
    np.testing.assert_allclose(population.sites["bn"].mean, X[:8].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("data", "received"),
    [
        (X[:, :4], "[(10, 4)]"),
        ([X[:, :4], Y], "[(10, 4)]"),
        (Loader(X[:, :4], Y), "[(4, 4), (4, 3)]"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: Any, received: str) -> None:
    with pytest.raises(tn.DataError) as caught:
        tn.collect(dense(), data)
    assert str(caught.value) == (
        "The data does not fit the model's inputs (at 'data'). Expected: shapes [(None, 5)]. "
        f"Received: {received}. Remedy: give batches of the model's own input shape, optionally "
        "with labels: (x, y)."
    )


def test_an_input_that_is_not_there_by_name_is_named() -> None:
    with pytest.raises(tn.DataError) as caught:
        tn.collect(identical_inputs(), {"a": SMALL, "b": SMALL})
    assert str(caught.value) == (
        "The data lacks an input of the model (at 'data'). Expected: the names ['z', 'a']. "
        "Received: ['a', 'b']. Remedy: name the columns as the model names its inputs."
    )


def test_a_dict_model_says_by_which_names_it_takes_its_inputs() -> None:
    inputs = {name: keras.Input((5,), name=name) for name in ("left", "right")}
    x = keras.layers.BatchNormalization()(keras.layers.Concatenate()([*inputs.values()]))
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse")
    for work in (tn.collect, tn.recalibrate, tn.diagnose):
        with pytest.raises(tn.DataError, match=r"the names \['left', 'right'\]\. Received: \['x"):
            work(model, {"x_left": X, "x_right": X})
        with pytest.raises(tn.DataError, match=r"by name .* a dict with \['left', 'right'\]"):
            work(model, [X, X])
    with pytest.raises(tn.DataError, match=r"not as many labels as samples .* \[9, 10\]"):
        tn.diagnose(model, {"left": X, "right": X}, np.zeros((9, 10)))


@pytest.mark.skipif(keras.config.backend() != "torch", reason="PyTorch's tensors may learn")
def test_a_tensor_that_learns_is_data_too() -> None:
    """As is one on a GPU: neither is an array of NumPy as it is."""
    x, model = keras.ops.convert_to_tensor(X).requires_grad_(), dense()
    model.compile("sgd", "mse")
    found, wanted = (tn.diagnose(model, data, Y, batch_size=4) for data in (x, X))
    assert found.findings == wanted.findings
    assert tn.collect(model, x).samples == len(X)
    assert tn.fold(model, probe=x).max_site_error < 1e-4


@pytest.mark.parametrize("model", [dense, subclassed])
def test_python_lists_are_refused_as_keras_refuses_them(model: Callable[[], Any]) -> None:
    with pytest.raises(tn.DataError, match=r"not made of arrays .* Received: float\. Remedy: make"):
        tn.collect(model(), X.tolist())


@pytest.mark.parametrize("model", [dense, subclassed])
def test_the_name_of_a_file_is_not_its_data(model: Callable[[], Any]) -> None:
    for tool in (tn.collect, tn.inspect):
        with pytest.raises(
            tn.DataError, match=r"the name of a file.* Received: 'x\.npz'\. Remedy: "
        ):
            tool(model(), "x.npz")


@pytest.mark.parametrize("data", [X, np.full((4, 3), "text")])
def test_what_a_subclassed_model_does_not_take_is_told_in_a_line(data: Any) -> None:
    with pytest.raises(
        tn.DataError, match=r"^The model does not take this data .*\(at 'own'\)"
    ) as e:
        tn.collect(subclassed(), data)
    assert "\n" not in str(e.value)
    assert str(data[:, :1].shape[0]) in str(e.value)


@pytest.mark.parametrize("model", [dense, subclassed])
def test_one_batch_of_data_in_batches_is_inspected_and_compared(model: Callable[[], Any]) -> None:
    made = model()
    x = X[:, : made.layers[0].weights[0].shape[0]]
    data = Loader(x, Y)
    wanted, found = tn.inspect(made, x[:4]), tn.inspect(made, data)
    assert (found.modes, found.not_run) == (wanted.modes, wanted.not_run)
    assert tn.replace(made, to="truenorm", probe=data).max_abs_error is not None


@pytest.mark.parametrize("model", [dense, subclassed])
@pytest.mark.parametrize(
    "data", [lambda x: (x, Y), lambda x: [(x[:4], Y[:4])] * 2, lambda x: [x[:4], x[4:]]]
)
def test_labels_and_lists_of_batches_are_read_by_inspect(
    model: Callable[[], Any], data: Callable[[Any], Any]
) -> None:
    made = model()
    x = X[:, : made.layers[0].weights[0].shape[0]]
    wanted, found = tn.inspect(made, x[:4]), tn.inspect(made, data(x))
    assert (found.modes, found.not_run) == (wanted.modes, wanted.not_run)


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(tn.DataError, match="different numbers of samples"):
        tn.collect(two_inputs(), [SMALL, LARGE[:9]])


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_a_batch_size_that_is_no_number_of_samples_is_refused(size: Any) -> None:
    with pytest.raises(tn.OptionError) as caught:
        tn.collect(dense(), X, batch_size=size)
    assert str(caught.value) == f"batch_size must be a positive integer. Received: {size!r}."
