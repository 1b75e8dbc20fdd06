"""The demo as its user meets it: what it touches, what it leaves, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from truenorm import OptionError, OutputError
from truenorm._demo.demo import _prepare
from truenorm._demo.tasks import breast_cancer

COMMAND = [sys.executable, "-m", "truenorm", "demo", "--data", "breast_cancer", "--seeds", "1"]
CHOICES = {
    "neither": {"force": False, "resume": False},
    "force": {"force": True, "resume": False},
    "resume": {"force": False, "resume": True},
}
REMEDY = (
    "Remedy: --force replaces an earlier demo there, --resume goes on with a stopped one, --out "
    "names another folder."
)

pytestmark = [pytest.mark.any_backend, pytest.mark.long]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


# --- the folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_a_folder_that_is_new_or_empty_is_taken(choice: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "new", tmp_path):
        _prepare(folder, **CHOICES[choice])
        assert folder.is_dir()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_demo_that_was_stopped_at_once_can_be_started(choice: str, tmp_path: Path) -> None:
    (tmp_path / "study" / "trials").mkdir(parents=True)
    fill(tmp_path, "study/.study.0a1b2c.tmp.json", "study/.lock")
    _prepare(tmp_path, **CHOICES[choice])


@pytest.mark.parametrize("choice", CHOICES)
def test_a_folder_of_others_is_not_touched(choice: str, tmp_path: Path) -> None:
    fill(tmp_path, "model.keras", "report.html", "study/notes.txt")
    before = files(tmp_path)
    with pytest.raises(OutputError) as caught:
        _prepare(tmp_path, **CHOICES[choice])
    kind = "" if choice == "neither" else " and not a demo's"
    assert str(caught.value) == (
        f"The output folder is not empty{kind} (at '{tmp_path}'). {REMEDY}"
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ("force", {"mine.txt"}),
        ("resume", {"mine.txt", "model.keras", "report.html", "study/study.json"}),
    ],
)
def test_a_demos_own_folder_is_replaced_or_kept(
    choice: str, kept: set[str], tmp_path: Path
) -> None:
    fill(tmp_path, "mine.txt", "model.keras", "report.html", "study/study.json")
    with pytest.raises(OutputError, match="The output folder is not empty \\(at"):
        _prepare(tmp_path, **CHOICES["neither"])
    _prepare(tmp_path, **CHOICES[choice])
    assert files(tmp_path) == kept


def test_a_file_is_no_folder_and_both_options_are_none(tmp_path: Path) -> None:
    fill(tmp_path, "file")
    with pytest.raises(OutputError, match="The output is a file"):
        _prepare(tmp_path / "file", **CHOICES["force"])
    with pytest.raises(OptionError) as caught:
        _prepare(tmp_path, force=True, resume=True)
    assert str(caught.value) == (
        "--force starts again and --resume continues: they exclude each other. "
        "Expected: at most one of them. "
        "Received: --force and --resume."
    )


# --- the journey -------------------------------------------------------------------------------

PLAIN_KERAS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "truenorm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import keras, numpy as np
model, data = keras.saving.load_model(sys.argv[1]), np.load(sys.argv[2])
print((model.predict(data["x"], verbose=0).argmax(axis=1) == data["y"]).mean())
"""


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [*COMMAND, "--out", str(out)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_answers_are_printed(journey: tuple[Path, str]) -> None:
    text = " ".join(journey[1].split())  # the verdict is wrapped to the width of the terminal
    assert "Each is trained once, for 20 epochs." in text
    assert text.count("but with 1 seed nothing can be told from chance") == 1
    assert "Diagnosis of 'breast_cancer':" in text
    assert "fold: 3 of 3 sites changed" in text
    assert (
        "hidden1_bn, hidden2_bn, hidden3_bn │ changed │ folded into Dense" in text
    )  # which one: as the best has it


def test_the_model_needs_no_truenorm_and_scores_as_printed(
    journey: tuple[Path, str], tmp_path: Path
) -> None:
    out, text = journey
    _, (x, y) = breast_cancer()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    arguments = [str(out / "model.keras"), str(tmp_path / "data.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_KERAS, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    printed = re.search(r"accuracy [\d.]+% before, ([\d.]+)% after", text)
    assert printed is not None
    assert f"{100 * float(done.stdout):.2f}" == printed[1]


def test_the_report_is_one_page_without_scripts(journey: tuple[Path, str]) -> None:
    page = (journey[0] / "report.html").read_text("utf-8")
    assert "<script" not in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "What is trained",
        "What is wrong with it?",
        "Are its statistics true?",
        "Where does BatchNormalization go?",
        "Cost",
        "Which mode is it in?",
        "Deploy it",
        "Settings",
    ]


def test_the_report_says_on_top_what_was_printed_and_says_it_once(
    journey: tuple[Path, str],
) -> None:
    page = (journey[0] / "report.html").read_text("utf-8")
    printed = re.search(r"accuracy ([\d.]+%) before, ([\d.]+%) after", journey[1])
    assert printed is not None
    lead = page[: page.index("<nav")]
    assert f"two validation accuracies: {printed[1]} with the moving statistics" in lead
    assert f"{printed[2]} with the statistics of the whole training set" in lead
    for answer in ("has the best validation accuracy", "Folded, a batch of 143 runs"):
        assert answer in lead
        assert page.count(answer) == 1
    settings = page[page.index("<h2>Settings") :]
    assert "versions: keras" in settings
    assert re.search(r"Run on \d{4}-\d\d-\d\d, \d\d:\d\d UTC\.", settings)
    assert "truenorm demo --data breast_cancer --seeds 1 --out" in settings


def test_a_second_demo_asks_first(journey: tuple[Path, str]) -> None:
    out = journey[0]
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    done = subprocess.run(
        [*COMMAND, "--out", str(out)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"truenorm: The output folder is not empty (at '{out}'). {REMEDY}"
    )
    assert {name: (out / name).stat().st_mtime_ns for name in files(out)} == before


def children(pid: int) -> set[int]:
    """Processes whose parent is this one, zombies left out."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        demo = subprocess.Popen(
            [*COMMAND, "--out", str(tmp_path / "out")],
            stdout=file,
            stderr=file,
            env=os.environ,
            start_new_session=True,
        )
    workers = set[int]()
    try:
        limit = time.monotonic() + 180  # of a busy machine
        while not workers and demo.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
            if any((tmp_path / "out" / "study" / "trials").glob("*.stderr")):
                workers = children(demo.pid)
        assert workers, log.read_text()
        os.kill(demo.pid, signal.SIGINT)
        assert demo.wait(30) == 130, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        demo.kill()
        demo.wait()
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
