"""What ``plot`` draws: the record's numbers, at the right places, with the right names."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from drawn_records import HOSTILE, POSITIONS, SHOWN, make_study
from fresh_process import output_of

from truenorm._errors import MissingDependencyError, OptionError
from truenorm._records.diagnosis import Diagnosis, Finding
from truenorm._records.drawings.curves import Curves, Line
from truenorm._records.drawings.drawing import plot
from truenorm._records.drawings.theme import DARK, LIGHT
from truenorm._records.inspection import Inspection
from truenorm._records.moments import Moments
from truenorm._records.monitoring import QUANTITIES, Monitoring
from truenorm._records.observation import Calls, Mode
from truenorm._records.population import Population
from truenorm._records.recalibration import Gap, Recalibration
from truenorm._records.site import Site

pytestmark = pytest.mark.any_backend
plt = pytest.importorskip("matplotlib.pyplot")
to_hex = pytest.importorskip("matplotlib.colors").to_hex

PATHS = ("stem_bn", "block/bn1", "block/bn2")


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    yield
    plt.close("all")


def names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def marks(axes: Any, marker: str, *, filled: bool | None = None) -> list[tuple[float, float]]:
    """Where there is such a mark."""
    paper = to_hex(axes.get_facecolor())
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() == marker
        and filled in (None, to_hex(line.get_markerfacecolor()) != paper)
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def words(axes: Any) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in [*axes.texts, *(legend.get_texts() if legend else ())]]


def population(**sites: Moments) -> Population:
    return Population(sites, 6, 1, "batch", 1)


def gaps_of(*values: tuple[float, float]) -> tuple[Gap, ...]:
    return tuple(Gap(path, *pair) for path, pair in zip(PATHS, values, strict=True))


def recalibration(paths: tuple[str, ...] = PATHS) -> Recalibration:
    before = gaps_of((0.5, 0.25), (2.0, 1.0), (0.125, 0.0))
    after = gaps_of((0.0, 1e-7), (3e-7, 0.0), (0.0, 0.0))
    renamed = [
        tuple(replace(gap, path=path) for gap, path in zip(gaps, paths, strict=True))
        for gaps in (before, after)
    ]
    return Recalibration(population(), renamed[0], renamed[1], lambda: None)


def site(path: str) -> Site:
    return Site(path, "keras.BatchNormalization", None, (), None, 3, 8, 0.99, 1e-3, True, "none")


TRAINED = Mode((Calls(True, True, "none", "batch", 1),), True, True)
MOVING = Mode((Calls(False, True, "none", "moving", 1),), False, False)
SHIFTED = Mode((Calls(True, True, "none", "batch", 1),), True, False)


def inspection(paths: tuple[str, ...] = PATHS) -> Inspection:
    modes = {
        "fit": (TRAINED, MOVING, TRAINED),
        "evaluate": (MOVING,) * 3,
        "model(x, training=True)": (SHIFTED, MOVING, SHIFTED),
    }
    return Inspection("net", tuple(map(site, paths)), modes)


def finding(code: str, severity: Any, where: str) -> Finding:
    return Finding(code, severity, f"problem of {code}", where, {"value": 1.0}, "mend it")


def diagnosis(paths: tuple[str, ...] = PATHS) -> Diagnosis:
    findings = (
        finding("TN103", "warning", paths[0]),
        finding("TN103", "warning", paths[2]),
        finding("TN105", "error", paths[1]),
        finding("TN110", "warning", "net"),
    )
    return Diagnosis("net", findings, ("TN103", "TN105", "TN110"), (), paths)


# --- layers -------------------------------------------------------------------------------------


def test_gaps_stand_in_the_row_of_their_layer_before_and_after() -> None:
    axes = recalibration().plot()
    assert names(axes.yaxis) == [*PATHS]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is on top
    for marker, field in (("o", "mean"), ("D", "scale")):
        for filled, gaps in ((False, recalibration().before), (True, recalibration().after)):
            found = marks(axes, marker, filled=filled)
            assert [x for x, _ in found] == [getattr(gap, field) for gap in gaps]
            assert [round(y) for _, y in found] == [0, 1, 2]
    assert words(axes) == [
        "mean off by (standard deviations), before",
        "mean off by (standard deviations), after",
        "scale off by (doublings), before",
        "scale off by (doublings), after",
    ]
    assert axes.get_xscale() == "symlog"  # with a place for zero
    assert axes.get_xlim()[0] < 0
    assert axes.get_xlim()[1] > 2


def test_a_population_is_drawn_as_its_table_has_it() -> None:
    values = np.array([[0.0, 10.0], [4.0, 10.5], [8.0, 11.0]])
    axes = population(bn=Moments.of(values)).plot()
    deviation = values.std(axis=0)
    assert marks(axes, "D") == [(10.5, -0.18)]
    (least, _), (largest, _) = marks(axes, "o", filled=False) + marks(axes, "o", filled=True)
    assert (least, largest) == pytest.approx((deviation[1], deviation[0]))
    assert names(axes.yaxis) == ["bn"]


# --- along the depth ----------------------------------------------------------------------------


def cells(axes: Any) -> dict[tuple[int, int], str]:
    """The colour of each column and row of the strips."""
    found: dict[tuple[int, int], str] = {}
    for bars in axes.collections:
        for path, colour in zip(bars.get_paths(), bars.get_facecolors(), strict=False):
            left, bottom, right, top = path.get_extents().extents
            for column in range(round(left + 0.5), round(right + 0.5)):
                found[column, round((bottom + top) / 2)] = to_hex(colour)
    return found


def test_every_site_has_the_colour_of_its_statistics_in_each_entry_point() -> None:
    axes = inspection().plot()
    assert names(axes.xaxis) == [*PATHS]
    assert names(axes.yaxis) == ["fit", "evaluate", "model(x, training=True)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    batch, moving = LIGHT["orange"], LIGHT["blue"]
    rows = [[batch, moving, batch], [moving] * 3, [batch, moving, batch]]
    assert cells(axes) == {(x, y): rows[y][x] for x in range(3) for y in range(3)}
    assert words(axes) == ["batch + updates + learns", "moving", "batch + updates"]


def test_of_many_sites_some_names_are_shown_and_all_are_coloured() -> None:
    paths = tuple(f"block{i}_bn" for i in range(121))
    found = Inspection("net", tuple(map(site, paths)), {"fit": (TRAINED,) * 60 + (MOVING,) * 61})
    axes = found.plot()
    shown = names(axes.xaxis)
    assert 20 < len(shown) < 121
    assert [*axes.get_xticks()] == [paths.index(name) for name in shown]
    assert [*cells(axes).values()] == [LIGHT["orange"]] * 60 + [LIGHT["blue"]] * 61


def test_findings_stand_at_their_site_the_gravest_on_top() -> None:
    axes = diagnosis().plot()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    rows = ["TN105", "TN103", "TN110"]
    assert words(axes)[:3] == [f"{code}  problem of {code}" for code in rows]
    assert words(axes)[3:] == ["error", "warning"]
    assert set(marks(axes, "X")) == {(1, 0)}
    assert set(marks(axes, "^")) == {(0, 1), (2, 1), (0, 2), (2, 2)}  # TN110: along the model
    assert names(axes.xaxis) == [*PATHS]


def test_findings_of_a_record_that_knows_no_sites_stand_in_their_own_order() -> None:
    axes = replace(diagnosis(), sites=()).plot()
    assert names(axes.xaxis) == [PATHS[0], PATHS[2], PATHS[1], "net"]
    assert set(marks(axes, "X")) == {(2, 0)}


def test_a_clean_diagnosis_says_so() -> None:
    axes = Diagnosis("net", (), ("TN101",), (), PATHS).plot()
    assert words(axes) == ["Nothing was found."]


# --- studies ------------------------------------------------------------------------------------


def test_the_differences_are_those_of_the_table() -> None:
    study = make_study()
    shown = [0.01, 0.2, None]
    every = tuple(
        replace(c, p_adjusted=p) for c, p in zip(study.comparisons[:3], shown, strict=True)
    )
    axes = replace(study, comparisons=every).plot()
    means = [(c.difference.mean, float(row)) for row, c in enumerate(every)]
    assert marks(axes, "o", filled=True) == means[:1]
    assert marks(axes, "o", filled=False) == means[1:]
    assert words(axes)[:3] == [f"{c.first} − {c.second}" for c in every]
    bars = [[*line.get_xdata()] for line in axes.lines if line.get_marker() == "None"]
    for comparison in every:
        assert [comparison.difference.low, comparison.difference.high] in bars


def test_the_margin_is_a_band_around_zero() -> None:
    (band,) = replace(make_study(), margin=0.03).plot().patches
    assert band.get_extents() is not None
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.03, 0.03))


def test_the_values_of_every_seed_stand_above_their_position() -> None:
    study = make_study()
    found = set(marks(study.plot(view="values"), "o"))
    assert found == {(POSITIONS.index(t.position), t.final["val_accuracy"]) for t in study.trials}


def means_of(axes: Any) -> dict[str, list[float]]:
    """The thick lines, by their colour."""
    return {
        to_hex(line.get_color()): [*line.get_ydata()]
        for line in axes.lines
        if line.get_linewidth() == 2.4 and len(line.get_ydata()) > 1
    }


def test_curves_are_the_means_over_the_seeds() -> None:
    study = make_study()
    axes = study.plot(view="curves", metric="val_loss")
    for position, colour in (("before_activation", "blue"), ("none", "slate")):
        own = [t.history["val_loss"] for t in study.trials if t.position == position]
        expected = np.mean(np.array(own), axis=0)
        assert means_of(axes)[LIGHT[colour]] == pytest.approx(expected)
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == "val_loss"
    assert not marks(axes, "D")  # it judges by what the curves show


def test_what_a_study_judges_by_stands_apart_from_its_curves() -> None:
    study = make_study(recalibrated=0.05)
    axes = study.plot(view="curves")
    diamonds = marks(axes, "D")
    assert [y for _, y in diamonds] == [
        row["val_accuracy"].mean for row in study.summaries.values()
    ]
    assert {x for x, _ in diamonds} == {diamonds[0][0]}
    last = max(max(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.4)
    assert last == 10 < diamonds[0][0]  # beside the last epoch, not among them
    assert "judged" in words(axes)
    assert f"none  {study.summaries['none']['val_accuracy'].mean:.4g}" in words(axes)
    ends = {name: row["val_accuracy"].mean for name, row in study.summaries.items()}
    drawn = means_of(axes)
    assert ends["before_activation"] == pytest.approx(drawn[LIGHT["blue"]][-1] + 0.05)
    assert ends["none"] == pytest.approx(drawn[LIGHT["slate"]][-1])
    assert any("recalibrated statistics" in note for note in study.drawing("curves").notes)


def test_what_the_statistics_alone_change_is_drawn_for_each_trained_model() -> None:
    study = make_study(recalibrated=0.05)
    axes = study.plot(view="statistics")
    own = [t for t in study.trials if t.position != "none"]
    assert names(axes.yaxis) == [f"{t.position}, seed {t.seed}" for t in own]
    before, after = (marks(axes, "o", filled=filled) for filled in (False, True))
    assert [x for x, _ in before] == [t.history["val_accuracy"][-1] for t in own]
    assert [x for x, _ in after] == [t.final["val_accuracy"] for t in own]
    assert words(make_study().plot(view="statistics")) == [
        "No model was judged with recalibrated statistics."
    ]


def test_a_view_or_metric_that_there_is_not_is_refused() -> None:
    with pytest.raises(OptionError) as caught:
        make_study(seeds=1).plot(view="curve")  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == (
        "A study has no such view (at 'view'). Expected: one of 'differences', 'values', "
        "'curves', 'statistics'. Received: 'curve'."
    )
    for view in ("differences", "values", "curves", "statistics"):
        with pytest.raises(OptionError, match="No trial recorded this metric"):
            make_study(seeds=1).plot(view=view, metric="f1")


def test_up_to_eight_versions_have_colours_of_their_own() -> None:
    for versions in (tuple("abcdefgh"), (*"abcd", "none", "before_activation")):
        study = make_study(versions, seeds=2, epochs=3)
        assert len(means_of(study.plot(view="curves"))) == len(versions)


# --- over time ----------------------------------------------------------------------------------


def test_anything_that_is_measured_again_can_be_drawn_over_time() -> None:
    steps = [0, 100, 200]
    lines = {"a": Line.of(steps, [3.0, 2.0, math.nan]), "b": Line.of(steps, [1.0, 1.5, 2.5])}
    drawing = Curves(title="t", alt="a", lines=lines, unit="off by", time="step")
    axes = plot(drawing)
    assert axes.get_xlabel() == "step"
    assert words(axes) == ["a  2", "b  2.5"]
    assert axes.get_xlim()[0] == 0
    assert axes.get_ylim()[0] < 1 < 3 < axes.get_ylim()[1]


def test_a_monitor_draws_the_distance_of_each_layer_over_the_steps() -> None:
    distances = np.array([[1.0, 0.5], [0.25, np.nan]])
    values = dict.fromkeys(QUANTITIES, np.zeros((2, 2))) | {"distance": distances}
    modes = (("batch", "batch"),) * 2
    axes = Monitoring("net", ("a", "b"), (4, 4), (0, 1), (10, 20), values, modes).plot()
    for drawn, column in zip(means_of(axes).values(), distances.T, strict=True):
        np.testing.assert_array_equal(drawn, column)
    assert sorted(words(axes)) == ["a  0.25", "b  0.5"]
    assert axes.get_xlabel() == "step"


def test_of_many_lines_the_first_and_the_last_are_named() -> None:
    lines = {f"bn{i}": Line.of([1, 2], [i, i + 1]) for i in range(20)}
    axes = plot(Curves(title="t", alt="a", lines=lines, unit="u"))
    assert words(axes) == ["bn0  1", "bn19  20"]
    assert len(means_of(axes)) == 20  # each has its own colour


# --- on the user's own Axes ---------------------------------------------------------------------


def every_record() -> dict[str, Any]:
    return {
        "inspection": inspection(),
        "population": population(bn=Moments.of(np.eye(3))),
        "recalibration": recalibration(),
        "diagnosis": diagnosis(),
        "study": make_study(epochs=2, seeds=2),
    }


@pytest.mark.parametrize("record", every_record())
def test_the_given_axes_are_drawn_on_and_come_back(record: str) -> None:
    figure, both = plt.subplots(1, 2)
    axes = every_record()[record].plot(both[0])
    assert axes is both[0]
    assert axes.get_title(loc="left")
    assert not both[1].has_data()
    assert axes.get_figure() is figure
    assert len(plt.get_fignums()) == 1


def test_transparent_axes_stay_transparent() -> None:
    axes = plt.subplots(facecolor="black")[1]
    axes.set_facecolor("none")
    recalibration().plot(axes)
    assert to_hex(axes.get_facecolor(), keep_alpha=True) == "#00000000"
    assert {to_hex(t.get_color()) for t in axes.get_legend().get_texts()} == {DARK["ink"]}


@pytest.mark.parametrize("record", every_record())
def test_a_picture_is_the_same_whatever_the_users_text_settings(record: str) -> None:
    settings = dict(plt.rcParams)
    with plt.rc_context({"text.parse_math": True}):
        axes = every_record()[record].plot()
        axes.get_figure().canvas.draw()
    assert dict(plt.rcParams) == settings
    assert not any(text.get_parse_math() for text in axes.texts)


def test_on_dark_paper_the_colours_are_those_for_it() -> None:
    with plt.style.context("dark_background"):
        axes = recalibration().plot()
        legend = axes.get_legend()
        assert to_hex(axes.get_facecolor()) == "#000000"
        assert {to_hex(text.get_color()) for text in legend.get_texts()} == {DARK["ink"]}
        colours = {to_hex(line.get_color()) for line in axes.lines if line.get_marker() != "None"}
        assert colours == {DARK["orange"], DARK["blue"]}


@pytest.mark.filterwarnings("ignore:.*[Gg]lyph:UserWarning")
def test_names_are_drawn_as_text() -> None:
    paths = (HOSTILE, "a$\\frac$b", "c")
    for record in (recalibration(paths), inspection(paths), diagnosis(paths)):
        axes = record.plot()
        axes.get_figure().canvas.draw()
        labels = names(axes.yaxis) + names(axes.xaxis)
        assert any("a$\\frac$b" in label for label in labels)
        assert any(SHOWN.endswith(label[1:]) for label in labels if len(label) > 20)


# --- without matplotlib -------------------------------------------------------------------------


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError) as caught:
        recalibration().plot()
    assert str(caught.value) == (
        'A picture needs matplotlib, which is not installed. Remedy: pip install "truenorm[plot]".'
    )


def test_records_do_not_load_matplotlib() -> None:
    code = (
        "import sys; from truenorm._records import diagnosis, inspection, study, study_drawings; "
        "from truenorm._records import population, recalibration; "
        "print({'keras', 'matplotlib', 'rich', 'scipy'} & {*sys.modules})"
    )
    assert output_of(code) == "set()"
