"""Tables as they are seen: on terminals of any width, in pipes, in notebooks."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import chromium
import keras
import numpy as np
import pytest
import rich.console

import truenorm as tn
from truenorm._records.inspection import Surprise
from truenorm._records.moments import Moments, Spread
from truenorm._records.observation import Calls, Mode
from truenorm._records.recalibration import Gap
from truenorm._records.tables import Record, Table, counted
from truenorm._records.terminal import code_in

pytestmark = pytest.mark.any_backend

L = keras.layers
BOX = re.compile("[━┃┏┓┗┛┡┩╇┳│└┘┴─┬┼╈┻]")


def paths(layers: int) -> list[str]:
    return [f"backbone/conv{i // 9 + 1}_block{i % 9 + 1}_bn" for i in range(layers)]


def inspection(layers: int) -> tn.Inspection:
    fit, moving = Mode((Calls(True, True, "none", "batch", 1),), True, True), Mode(
        (Calls(None, True, "none", "moving", 1),), False, False)  # fmt: skip
    sites = [
        tn.Site(path, "keras.BatchNormalization", "Conv2D c", ("ReLU r", "Add a")[: 1 + i % 2],
                "before_activation", 3, 64, 0.99, 1e-3, True, "none")
        for i, path in enumerate(paths(layers))
    ]  # fmt: skip
    modes = {"fit": fit, "evaluate": moving, "predict": moving, "model(x)": moving}
    why = Surprise(
        paths(1)[0], "frozen_parent",
        "'backbone', which it is in, is frozen (trainable=False), and with it all inside",
    )  # fmt: skip
    return tn.Inspection(
        "net", tuple(sites), {entry: (mode,) * layers for entry, mode in modes.items()}, (why,)
    )


def recalibration(layers: int) -> tn.Recalibration:
    moments = Moments.of(np.arange(6.0).reshape(3, 2))
    sites = dict.fromkeys(paths(layers), moments)
    spread = dict.fromkeys(paths(layers), Spread.of(moments))
    population = tn.Population(sites, 3, 1, "batch", 1, spread)
    gaps = tuple(Gap(path, 0.746, 3.07) for path in paths(layers))
    return tn.Recalibration(population, gaps, gaps, lambda: None)


def diagnosis(layers: int) -> tn.Diagnosis:
    evidence = {"initial_share": 0.58, "mean_off_by_std": 1.19, "output_error": 0.821}
    findings = [
        tn.Finding(code, severity, "moving statistics still hold their initial values", path,
                   evidence, "tn.recalibrate(model, data)")
        for path in paths(layers)
        for code, severity in (("TN105", "error"), ("TN102", "warning"), ("TN206", "note"))
    ]  # fmt: skip
    return tn.Diagnosis("net", tuple(findings), ("TN102", "TN105", "TN206"))


def test_names_in_evidence_are_as_they_are_in_the_model() -> None:
    evidence = {"dead_ones": 1, "which": "3", "cause": "behind 'drop_out_1' of my_model"}
    finding = tn.Finding("TN302", "warning", "off", "block_1/bn_2", evidence, "look")
    row = "dead ones 1, which 3, cause behind 'drop_out_1' of my_model"
    assert row in str(finding)
    assert html.escape(row) in finding._repr_html_()
    assert "block_1/bn_2" in str(finding)


def test_each_of_the_sites_in_a_row_has_its_channels() -> None:
    findings = tuple(
        tn.Finding("TN202", "warning", "dead", path, {"constant": n, "which": which}, "look")
        for path, n, which in (("a", 2, "0, 7"), ("b", 1, "3"), ("c", 1, "5"))
    )
    two, three = (tn.Diagnosis("net", findings[:n], ("TN202",)).tables()[0].rows for n in (2, 3))
    assert [row[2:] for row in two] == [("a, b", "constant 1…2, which 0, 7; 3")]
    assert [row[2:] for row in three] == [("3 sites: a, … c", "constant 1…2, which 0, 7; …; 5")]


MADE: tuple[Callable[[int], Record], ...] = (inspection, recalibration, diagnosis)


def words(text: str) -> set[str]:
    return set(BOX.sub(" ", text).split())


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("layers", [1, 53])
@pytest.mark.parametrize("columns", [60, 80, 100, 160])
def test_a_record_is_as_wide_as_the_terminal_and_no_word_is_split(
    make: Callable[[int], Record], layers: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    record = make(layers)
    shown = str(record)
    assert max(map(len, shown.splitlines())) <= columns
    for table in record.tables():
        for text in (
            table.title,
            *table.columns[1:],  # the first stands alone where rows are stacked
            *table.notes,
            *(c for r in table.rows for c in r),
        ):
            assert words(text) <= words(shown)


def test_columns_that_do_not_fit_are_stacked_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(
        "Title", ("site", "number", "a reason"),
        (("a, b", "1", "one that is rather long to be put in a column"), ("c", "22", "short")),
        ("A note.",),
    )  # fmt: skip

    class Shown(Record):
        def tables(self) -> tuple[Table, ...]:
            return (table,)

    try:
        monkeypatch.setenv("COLUMNS", "60")
        assert str(Shown()).splitlines() == [
            "Title",
            "a, b",
            "  number    1",
            "  a reason  one that is rather long to be put in a column",
            "c",
            "  number    22",
            "  a reason  short",
            "A note.",
        ]
        monkeypatch.setenv("COLUMNS", "80")
        assert str(Shown()).splitlines()[2] == (
            "┃ site ┃ number ┃ a reason                                      ┃"
        )
    finally:
        del Shown


def test_a_pipe_has_120_columns_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    code = (
        "import truenorm as tn; from truenorm._records.tables import Table\n"
        "class Long(tn.Diagnosis):\n"
        "    def tables(self): return (Table('t', ('a',), (('word ' * 60,),)),)\n"
        "print(Long('m', (), ()))"
    )
    run = [sys.executable, "-c", code]
    for columns, expected in ((None, 120), ("100", 100)):
        environment = {**os.environ, **({"COLUMNS": columns} if columns else {})}
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
        assert expected - 5 <= max(map(len, done.stdout.splitlines())) <= expected


def on_a_terminal(code: str, columns: int, **environment: str) -> str:
    """What a program writes to a terminal of that width."""
    import fcntl
    import pty
    import struct
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=child, stdout=child, stderr=child,
        env={**inherited, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(child)
    said = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the terminal has no other end any more
            break
        if not part:
            break
        said += part
    process.wait()
    os.close(parent)
    return said.decode().replace("\r\n", "\n")


DIAGNOSIS = (
    "import truenorm as tn\n"
    "from truenorm._cli.output import show\n"
    "found = [tn.Finding(f'TN10{i}', severity, 'a problem of some length, in words', 'a_bn', "
    "{'measured': 0.5}, 'a call') for i, severity in enumerate(('note', 'warning', 'error'))]\n"
    "record = tn.Diagnosis('net', tuple(found), ())\n"
)


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_print_takes_the_terminals_width_and_the_command_colours_by_severity() -> None:
    for columns in (60, 100):
        plain = on_a_terminal(DIAGNOSIS + "print(record)", columns)
        assert "\x1b" not in plain
        assert max(map(len, plain.splitlines())) <= columns
    coloured = on_a_terminal(DIAGNOSIS + "show(record, as_json=False)", 100)
    assert re.search(r"\x1b\[1;31mTN102 error", coloured)
    assert re.search(r"\x1b\[33mTN101 warning", coloured)
    without = on_a_terminal(DIAGNOSIS + "show(record, as_json=False)", 100, NO_COLOR="1")
    assert "TN102 error" in without
    assert not re.search(r"\x1b\[[\d;]*3[136]m", without)


def test_sites_that_are_folded_alike_share_a_row() -> None:
    layers = [
        layer
        for i in range(5)
        for layer in (
            L.Conv2D(4, 3, padding="same", name=f"c{i}"),
            L.BatchNormalization(),
            L.ReLU(),
        )
    ]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers, L.BatchNormalization(name="last")])
    rewrite = tn.fold(model)
    (table,) = rewrite.tables()
    assert table.rows[0][1:] == ("changed", "folded into Conv2D before it")
    assert table.rows[0][0].startswith("5 sites: ")
    assert len(table.rows) == 2
    assert "ReLU" in table.rows[1][2]  # a single one is told in full
    assert rewrite.changed[0].what == "folded into Conv2D c0 before it"


def test_one_of_something_is_singular() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert [counted(n, "batch") for n in (1, 3)] == ["1 batch", "3 batches"]
    assert str(recalibration(1)).startswith("Recalibrated 1 layer over 3 samples\n")


# --- notebooks -----------------------------------------------------------------------------------


def test_text_is_left_and_numbers_are_right_in_a_notebook() -> None:
    shown = recalibration(2)._repr_html_()
    cells = re.findall(r'<td style="text-align:(\w+)[^>]*>([^<]*)</td>', shown)
    assert cells[:3] == [("left", paths(1)[0]), ("right", "0.746"), ("right", "0.7")]
    assert "border-left:4px solid #d33" in diagnosis(1)._repr_html_()


PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ background: {paper}; color: {ink}; font: 14px sans-serif; width: {width}px; margin: 0 }}
td, th {{ text-align: right }} /* as notebooks have it */</style><body>{body}
<script>
const wide = [...document.querySelectorAll("td, th, p, caption")];
const cut = wide.filter(one => one.scrollWidth > one.clientWidth + 1).length;
const out = document.body.scrollWidth > {width} + 1;
const right = [...document.querySelectorAll("td")].filter(
  one => getComputedStyle(one).textAlign == "right").length;
document.body.dataset.told = [cut, out, right].join(" ");
</script>"""


@pytest.mark.skipif(chromium.CHROMIUM is None, reason=chromium.NEEDS_CHROMIUM)
@pytest.mark.parametrize("width", [360, 900])
def test_no_cell_is_cut_in_a_narrow_notebook(width: int, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    body = "".join(make(3)._repr_html_() for make in MADE)
    page.write_text(PAGE.format(paper="#fff", ink="#000", width=width, body=body), "utf-8")
    cut, out, right = re.search(r'data-told="(\S+) (\S+) (\S+)"', chromium.visit(page).dom).groups()
    assert (cut, out) == ("0", "false")
    assert int(right) == 3 * 4 + 2  # the recalibration's numbers, and the channels


class Remedies(Record):
    """Notes with code in them."""

    CALL = 'tn.freeze(model, "statistics", layers=["a_layer", "another_layer (the second)"])'
    COMMAND = "truenorm place 'a file.keras' none --where batch_normalization_7 --out new.keras"

    def tables(self) -> list[Table]:
        prose = "and then many words that say why this is so and what else there may be to do"
        row = ("one", "some words that go to another line", "a-word-that-is-longer-than-a-line" * 2)
        notes = (
            f"Remedy of TN1: {self.CALL}; {prose}.",
            f"Remedy of TN2: {self.COMMAND}: {prose}.",
        )
        return [Table("title", ("site", "a heading of words", "c"), (row,), notes)]


def test_a_name_from_a_file_is_looked_through_once() -> None:
    assert len([*code_in("a.b(" * 20_000)]) == 1
    assert [*code_in("a" * 100_000)] == []
    assert [*code_in("a." * 50_000)] == []


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_code_can_be_copied(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """It stands on one line, however narrow; nothing else is wider than asked for."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = str(Remedies()).splitlines()
    for code in (Remedies.CALL, Remedies.COMMAND):
        (line,) = (line for line in lines if code in line)
        assert len(line) <= max(width, len(code) + 1)
        lines.remove(line)
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line.endswith(" ")]
    words = " ".join(lines).split()
    assert {"another", "heading"} <= {*words}
    console = rich.console.Console(width=width, color_system=None)
    with console.capture() as cut:
        console.print(Remedies())  # would be cut off at the width: so it is wrapped
    assert "".join(Remedies.CALL.split()) in "".join(cut.get().split())
