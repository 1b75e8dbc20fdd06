"""Reports: everything is in the page, nothing in the page acts, and the file is whole."""

from __future__ import annotations

import base64
import builtins
import html
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from chromium import CHROMIUM, NEEDS_CHROMIUM, visit
from drawn_records import HOSTILE, POSITIONS, SHOWN, judge, make_study
from fresh_process import output_of

from truenorm._errors import MissingDependencyError, OptionError, OutputError
from truenorm._records.inspection import Inspection
from truenorm._records.moments import Moments
from truenorm._records.observation import Calls, Mode
from truenorm._records.population import Population
from truenorm._records.recalibration import Gap, Recalibration
from truenorm._records.rewrite import Change, Left, Rewrite
from truenorm._records.site import Site
from truenorm._records.study import Study
from truenorm._records.tables import Record, Table, number
from truenorm.report import (
    Chart,
    Section,
    comparison,
    gaps,
    learning_curves,
    picture,
    report,
    save,
    study_page,
)

pytestmark = pytest.mark.any_backend

NOT_FINITE = (
    "Runs in which val_loss was not a finite number in some epoch: 1; the means are of the other "
    "values."
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=NEEDS_CHROMIUM)


def make_records(path: str = "backbone/conv1_bn") -> tuple[Record, ...]:
    site = Site(path, "keras.BatchNormalization", f"Conv2D {path}", (f"ReLU {path}",),
                "before_activation", 3, 64, 0.99, 1e-3, True, "none")  # fmt: skip
    mode = Mode((Calls(True, True, "none", "batch", 3),), True, True)
    population = Population({path: Moments.of(np.arange(12.0).reshape(6, 2))}, 6, 1, "batch", 1)
    return (
        Inspection(path, (site,), {"fit": (mode,)}),
        Recalibration(
            population, (Gap(path, 0.125, 0.0625),), (Gap(path, 0.0, 0.0),), lambda: None
        ),
        population,
        Rewrite(None, f"place {path}", (Change(path, "moved"),), (Left(path, path),), 1e-7, 2e-7),
    )


def make_page(name: str = "study") -> str:
    study = make_study(name=name)
    before = (Gap("a/bn", 0.5, 0.25), Gap("b/bn", 2.0, 0.0))
    after = (Gap("a/bn", 0.0, 1e-7), Gap("b/bn", 3e-7, 0.0))
    charts = (learning_curves(study, "val_accuracy"), learning_curves(study, "val_loss"))
    return report(
        f"{name}: where does it go?",
        study.verdict,
        (
            Section("Curves", ("How the positions learned.",), charts),
            Section("Comparison", (), (comparison(study, "val_accuracy"), study)),
            Section("Statistics", (), (gaps(before, after), *make_records())),
        ),
    )


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def drawn(chart: Chart) -> list[str]:
    """All texts of both drawings, which are well-formed and hold no foreign element."""
    words: list[str] = []
    for svg in filter(None, (chart.svg, chart.narrow)):
        root = ET.fromstring(svg)  # noqa: S314 - our own text
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags <= {
            *("svg", "title", "desc", "style", "defs", "g", "path", "use", "text", "clipPath"),
            *("rect",),
        }
        words += [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    return words


# --- safety -------------------------------------------------------------------------------------


def test_names_are_shown_as_text_everywhere() -> None:
    study = make_study((HOSTILE, "none"), name=HOSTILE)
    chart = Chart(HOSTILE, HOSTILE, "<svg/>", "", (HOSTILE,))
    table = Table(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),), (HOSTILE,))
    content = (chart, table, study, *make_records(HOSTILE), learning_curves(study, "val_loss"))
    page = report(HOSTILE, HOSTILE, [Section(HOSTILE, (HOSTILE,), content), Section("b")])
    reader = Reader(page)
    assert sum(tag == "img" for tag, _ in reader.tags) == 2  # the charts
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert reader.text.count(SHOWN) >= 20
    assert next(a["alt"] for t, a in reader.tags if t == "img") == SHOWN
    assert page.encode()  # no lone surrogate is left
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", page)


def test_charts_show_hostile_names_as_text() -> None:
    study = make_study((HOSTILE, "before_activation"), seeds=2, epochs=2)
    row = (Gap(HOSTILE, 0.1, 0.2),)
    for chart in (learning_curves(study, "val_loss"), comparison(study, "val_loss"), gaps(row)):
        assert any("]]>" in text for text in drawn(chart))


def test_the_page_holds_no_script_and_refers_to_nothing_outside() -> None:
    page = make_page()
    reader = Reader(page)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    policy = [a for t, a in reader.tags if t == "meta" and "http-equiv" in a]
    assert policy == [
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        }
    ]
    for _, attrs in reader.tags:
        for name in ("src", "srcset", "href"):
            assert re.match(r"data:image/svg\+xml;base64,|#section-\d$|None$", str(attrs.get(name)))
    plain = re.sub(r"base64,[\w+/=]+", "", page)
    assert "http:" not in plain
    assert "https:" not in plain
    assert "url(" not in plain
    for svg in images(page):
        assert set(re.findall(r'https?://[^"]+', svg)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert set(re.findall(r"url\((.)", svg)) <= {"#"}


def images(page: str) -> list[str]:
    return [base64.b64decode(m).decode() for m in re.findall(r"svg\+xml;base64,([\w+/=]+)", page)]


# --- content ------------------------------------------------------------------------------------


def test_every_cell_and_note_of_the_tables_is_in_the_page() -> None:
    text = Reader(make_page()).text
    for record in (make_study(), *make_records()):
        for table in record.tables():
            cells = [cell for row in table.rows for cell in row]
            for words in (table.title, *table.columns, *cells, *table.notes):
                assert words in text


def test_numbers_are_aligned_and_text_is_not() -> None:
    rows = (
        ("a", "0.5 [0.4, 0.6]", "1e-07", "−3%", "–", "2 of 3"),
        ("b", "–", "nan", "1", "–", "x"),
    )
    page = report("t", "", [Section("s", (), (Table("n", tuple("abcdef"), rows),))])
    head = re.findall(r'<th scope="col"( class="number")?>', page)
    assert [bool(mark) for mark in head] == [False, True, True, True, False, False]
    assert '<td class="number">0.5<span class="range"> [0.4, 0.6]</span></td>' in page


def test_the_verdict_stands_before_the_sections() -> None:
    page = make_page()
    assert page.index("before_activation is best.") < page.index("<nav") < page.index("<section")


def test_long_names_break_behind_their_underscores_only() -> None:
    rows = (("block1/before_activation", "a_b <i>"),)
    page = report("t", "", [Section("s", (), (Table("n", ("layer", "why"), rows),))])
    assert "block1/<wbr>before_<wbr>activation" in page
    assert "a_<wbr>b &lt;i&gt;" in page


def test_a_record_is_drawn_as_its_own_plot_has_it() -> None:
    inspection, recalibration = make_records("deep/bn")[:2]
    assert isinstance(inspection, Inspection)
    assert isinstance(recalibration, Recalibration)
    assert {"deep/bn", "fit", "batch + updates + learns"} <= set(drawn(picture(inspection)))
    assert picture(recalibration) == gaps(recalibration.before, recalibration.after)


def test_a_chart_says_what_it_shows_to_those_who_do_not_see_it() -> None:
    shown = learning_curves(make_study(seeds=2, recalibrated=0.05), "val_accuracy")
    for svg in (shown.svg, shown.narrow):
        root = ET.fromstring(svg)  # noqa: S314 - our own text
        assert root.get("role") == "img"
        assert [(e.text, e.tag[-5:]) for e in root][:2] == [
            (shown.title, "title"),
            (shown.alt, "}desc"),
        ]
    assert "Judged with recalibrated statistics: " in shown.alt


def test_the_report_ends_with_settings_date_and_command() -> None:
    study = make_study(seeds=2)
    settings = {
        "epochs": 3,
        "versions": {"keras": "3.15.1"},
        "command": "truenorm study mlp --epochs 3",
        "date": "2026-01-02, 03:04 UTC",
    }
    page = study_page(replace(study, settings=settings))
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[-1] == "Settings"
    end = page[page.index("<h2>Settings") :]
    for words in ("3.15.1", "truenorm study mlp --epochs 3", "Run on 2026-01-02, 03:04 UTC."):
        assert words in end
    assert page.count(study.verdict[0]) == 1


def test_a_single_sentence_is_one_paragraph() -> None:
    assert "<p>Nothing.</p>" in report("t", "Nothing.", [])


def test_the_same_records_give_the_same_page() -> None:
    assert make_page() == make_page()


def test_charts_ignore_the_users_matplotlib_settings() -> None:
    import matplotlib as mpl

    study = make_study(epochs=2)
    expected = learning_curves(study, "val_loss")
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert learning_curves(study, "val_loss") == expected


def test_the_drawn_means_are_those_of_the_table() -> None:
    study = make_study()
    words = [re.sub(r"\s+", " ", text) for text in drawn(learning_curves(study, "val_accuracy"))]
    for position, row in study.summaries.items():
        assert words.count(f"{position} {number(row['val_accuracy'].mean, 4)}") == 2


def test_a_position_has_one_colour_in_all_charts() -> None:
    blue = re.compile("#0a4f9c; stroke|stroke: #0a4f9c")
    for positions in (POSITIONS, POSITIONS[::-1], ("none", "before_activation")):
        study = make_study(positions, seeds=2, epochs=2)
        for chart in (learning_curves(study, "val_loss"), comparison(study, "val_loss")):
            assert blue.search(chart.svg.partition("</style>")[2])


# --- charts of difficult records ----------------------------------------------------------------


def changed(study: Study, position: str, seed: int, **facts: Any) -> Study:
    trials = [
        replace(t, **facts) if (t.position, t.seed) == (position, seed) else t for t in study.trials
    ]
    return judge(trials, tuple(study.summaries))


def with_loss(study: Study, position: str, seed: int, values: tuple[float, ...]) -> Study:
    history = {"val_loss": values, "val_accuracy": (0.5,) * len(values)}
    final = {name: values[-1] for name, values in history.items()}
    return changed(study, position, seed, history=history, final=final)


@pytest.mark.parametrize(
    ("study", "notes"),
    [
        pytest.param(make_study(seeds=1), {"One seed.", "One seed gives no interval."}, id="seed"),
        pytest.param(make_study(epochs=1), set(), id="epoch"),
        pytest.param(make_study(seeds=1, epochs=1), {"One seed."}, id="seed and epoch"),
        pytest.param(make_study(("none",)), set(), id="position"),
        pytest.param(make_study(tuple("abcdefg"), seeds=2), set(), id="many positions"),
        pytest.param(
            with_loss(make_study(epochs=3), "none", 1, (1.0, math.nan, math.nan)),
            {NOT_FINITE},
            id="nan",
        ),
        pytest.param(
            with_loss(make_study(epochs=3), "none", 1, (3e38, 1.0, 0.9)),
            {"Values outside the axis, far from all others: 1."},
            id="huge",
        ),
        pytest.param(
            with_loss(make_study(epochs=3), "none", 1, (math.inf, 1.0)),
            {NOT_FINITE},
            id="inf, ragged",
        ),
        pytest.param(
            changed(make_study(), "none", 2, history={}, final={}, error="killed"),
            {"Seeds left out, as in the tables, because a run of theirs did not finish: 2."},
            id="failed",
        ),
    ],
)
def test_difficult_studies_are_drawn_and_said(study: Study, notes: set[str]) -> None:
    charts = (learning_curves(study, "val_loss"), comparison(study, "val_loss"))
    for chart in charts:
        assert "val_loss" in drawn(chart)
        assert chart.alt
    assert notes <= {note for chart in charts for note in chart.notes}


def test_a_study_without_a_finished_run_says_so() -> None:
    study = make_study(seeds=2)
    trials = tuple(replace(t, history={}, final={}, error="killed") for t in study.trials)
    for draw in (learning_curves, comparison):
        chart = draw(replace(study, trials=trials), "val_loss")
        assert "No run ended with a finite val_loss." in drawn(chart)
        assert "did not finish: 0, 1." in chart.notes[-1]


def test_an_unknown_metric_is_refused() -> None:
    message = (
        "No trial recorded this metric (at 'metric'). Expected: one of 'val_accuracy', "
        "'val_loss'. Received: 'f1'."
    )
    with pytest.raises(OptionError) as caught:
        learning_curves(make_study(seeds=1), "f1")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ((), (), None),
        ((Gap("a", 0.0, 0.0),), (Gap("a", 0.0, 0.0),), None),
        ((Gap("a", 0.3, 0.0),), (), "The moving statistics as found."),
        (
            (Gap("a", math.nan, 1e30), Gap("b", 1e-12, math.inf)),
            (Gap("other", 1.0, 1.0),),
            "Gaps that are not finite numbers and are not drawn: 2.",
        ),
        (
            tuple(Gap(f"l{i}", i / 10, 0.0) for i in range(90)),
            (),
            "The 40 layers furthest off, of 90; the table has all.",
        ),
    ],
)
def test_gaps_of_any_size_are_drawn(
    before: tuple[Gap, ...], after: tuple[Gap, ...], note: str | None
) -> None:
    chart = gaps(before, after)
    words = drawn(chart)
    assert note is None or note in chart.notes
    assert "There is no layer." in words if not before else before[-1].path in words


# --- missing packages, and the file -------------------------------------------------------------


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_remedy(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(seeds=1, epochs=1)
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r'pip install "truenorm\[report\]"') as caught:
        report("t", "", [Section("s", (), (learning_curves(study, "val_loss"),))])
    assert package in str(caught.value).lower()


def test_save_writes_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    save(file, "one é")
    save(str(file), "two 漢")
    assert file.read_text("utf-8") == "two 漢"
    assert [*tmp_path.iterdir()] == [file]


def test_save_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "report.html")
    save(tmp_path / "link.html", "new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "report.html").read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(
    step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.html"
    save(file, "old")

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        save(file, "new")
    if isinstance(failure, OSError):
        assert str(caught.value) == (
            f"The file cannot be written (at '{file}'). Expected: a file name in a folder that "
            "exists and can be written to. Received: No space left on device. Remedy: choose "
            "another path; what was there is unchanged."
        )
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("path", ["missing/report.html", ".", "file/report.html", "loop"])
def test_a_place_that_is_no_place_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="The file cannot be written"):
        save(tmp_path / path, "page")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


def test_importing_the_report_loads_neither_keras_nor_matplotlib() -> None:
    code = "import sys, truenorm.report; print({'keras', 'matplotlib', 'jinja2'} & {*sys.modules})"
    assert output_of(code) == "set()"


# --- in a browser -------------------------------------------------------------------------------


@needs_chromium
def test_the_browser_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    save(tmp_path / "page.html", make_page(HOSTILE))
    seen = visit(tmp_path / "page.html")
    assert seen.console == ()
    assert html.escape(SHOWN, quote=False) in seen.dom


@needs_chromium
def test_the_browser_refuses_a_script_and_the_check_sees_it(tmp_path: Path) -> None:
    page = make_page().replace("</main>", "<script>document.title = 'run'</script></main>")
    save(tmp_path / "page.html", page)
    seen = visit(tmp_path / "page.html")
    assert any("Content Security Policy" in line for line in seen.console)
    assert "<title>run</title>" not in seen.dom


@needs_chromium
@pytest.mark.parametrize(
    ("dark", "size"), [(False, (1280, 1600)), (True, (1280, 1600)), (False, (390, 1600))]
)
def test_the_page_and_its_charts_are_painted(
    dark: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    from matplotlib.image import imread

    save(tmp_path / "page.html", make_page())
    visit(tmp_path / "page.html", picture=tmp_path / "page.png", size=size, dark=dark)
    pixels = imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[:2] == size[::-1]
    paper = (20, 23, 28) if dark else (255, 255, 255)
    orange = (247, 151, 90) if dark else (199, 80, 0)  # only the charts have it
    assert matching(pixels, paper) > 0.5
    assert matching(pixels, orange) > 2e-4


def matching(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """The share of the pixels that have this colour."""
    return float(np.mean(np.all(np.rint(pixels * 255) == colour, axis=-1)))
