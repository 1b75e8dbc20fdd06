"""Records pickle: a study, a pool or a Ray task hands them to another process."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import small_models as models
from fresh_process import output_of

import truenorm as tn
import truenorm._records
from truenorm import archive
from truenorm._records.study import Comparison, Interval, Trial
from truenorm._records.tables import Record

pytestmark = pytest.mark.any_backend


def array(value: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(value)


@pytest.fixture(scope="module")
def model() -> Any:
    network = tn.replace(models.shake(models.dense()), to="truenorm").model
    network.compile("sgd", "mse")
    return network


@pytest.fixture(scope="module")
def records(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[type[Record], Record]:
    """One of every kind, as the tools make them."""
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    path = tmp_path_factory.mktemp("pickle") / "model.keras"
    archive.save(model, path)
    read = archive.read(path)
    inspection = tn.inspect(model)
    with tn.observe(model) as observation:
        model.predict(x, verbose=0)
    monitor = tn.callbacks.Monitor()
    model.fit(x, x[:, :3], callbacks=[monitor], verbose=0)
    trial = Trial("none", 0, {"val_loss": (1.0, 0.5)}, {"val_loss": 0.5}, 0, 10, 1.0, "a.keras")
    interval = Interval(0.5, None, None, 1)
    made = [
        read,
        *read.layers,
        read.layers[0].statistics,
        inspection,
        *inspection.sites,
        *observation.modes.values(),
        observation,
        tn.collect(model, x),
        tn.recalibrate(model, x),
        tn.freeze(model),
        tn.sync_statistics(model),
        monitor.history,
        tn.place(model, "after_activation"),
        tn.diagnose(model, x),
        tn.Finding("TN101", "note", "a problem", "bn", {"gap": 0.5}, "a call"),
        trial,
        tn.Study("s", {"seeds": [0]}, (trial,), {"none": {"val_loss": interval}},
                 (Comparison("val_loss", "a", "b", interval, None, None),), "val_loss", "none",
                 None, ("A sentence.",)),
    ]  # fmt: skip
    return {type(record): record for record in made}


def kinds() -> list[type[Record]]:
    for module in pkgutil.iter_modules(truenorm._records.__path__):
        importlib.import_module(f"truenorm._records.{module.name}")
    return Record.__subclasses__()


def through_pickle(record: Any) -> Any:
    return pickle.loads(pickle.dumps(record))  # noqa: S301


@pytest.mark.parametrize("again", [through_pickle, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", kinds())
def test_every_record_keeps_its_facts(
    kind: type[Record], records: dict[type[Record], Record], again: Callable[[Any], Any]
) -> None:
    record = records[kind]
    other = again(record)
    assert type(other) is kind
    assert other.to_json() == record.to_json()
    assert str(other) == str(record)
    assert other._repr_html_() == record._repr_html_()


@pytest.mark.parametrize("kind", kinds())
def test_every_record_comes_back_from_its_json(
    kind: type[Record], records: dict[type[Record], Record]
) -> None:
    text = records[kind].to_json()
    head = {name: json.loads(text)[name] for name in ("schema", "schema_version", "truenorm")}
    assert head == {
        "schema": f"truenorm.{kind.__name__}",
        "schema_version": 1,
        "truenorm": tn.__version__,
    }
    other = kind.from_json(text)
    assert type(other) is kind
    assert other.to_json() == text
    assert str(other) == str(records[kind])
    assert repr(other) == repr(records[kind])


@pytest.mark.parametrize("kind", kinds())
def test_every_record_is_one_line_in_the_interpreter(
    kind: type[Record], records: dict[type[Record], Record]
) -> None:
    shown = repr(records[kind])
    assert shown.startswith(f"<{kind.__name__} ")
    assert len(shown) <= 100
    assert "\n" not in shown


@pytest.mark.parametrize("again", [through_pickle, copy.deepcopy])
@pytest.mark.parametrize("kind", [tn.Freezing, tn.Recalibration])
def test_an_undo_stays_with_the_record_of_the_tool(
    kind: type[Any], records: dict[type[Record], Any], again: Callable[[Any], Any]
) -> None:
    with pytest.raises(tn.ModelError) as caught:
        again(records[kind]).undo()
    assert str(caught.value) == (
        "This record is a copy, which cannot undo anything. Expected: the record that the tool "
        "returned, in the process where it ran. Remedy: call undo() of that one."
    )
    records[kind].undo()


@pytest.mark.long
def test_a_rewrites_model_goes_along_to_a_fresh_process(
    records: dict[type[Record], Any], tmp_path: Path
) -> None:
    rewrite = records[tn.Rewrite]
    x = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
    (tmp_path / "rewrite").write_bytes(pickle.dumps((rewrite, x)))
    code = (
        "import pickle, sys, pathlib\n"
        "rewrite, x = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(rewrite.kind, rewrite.model.predict(x, verbose=0).tolist())"
    )
    kind, _, outputs = output_of(code, tmp_path / "rewrite").partition(" [")
    assert kind == rewrite.kind
    np.testing.assert_allclose(eval("[" + outputs), rewrite.model.predict(x, verbose=0), rtol=1e-5)  # noqa: S307
