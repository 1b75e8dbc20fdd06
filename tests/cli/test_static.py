"""``inspect FILE --static``: what it imports, and what reads its command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_process import output_of, truenorm_command

pytestmark = pytest.mark.any_backend


def test_the_separate_process_of_a_static_reading_imports_what_reads_a_file(
    file: Path, tmp_path: Path
) -> None:
    shown = output_of(
        "import sys; from truenorm._cli.static import enter\n"
        f"enter({str(tmp_path)!r}, file={str(file)!r}, as_json=False, memory=0)\n"
        "heavy = {'keras', 'jax', 'torch', 'tensorflow', 'typer', 'scipy', 'matplotlib'}\n"
        "print(heavy & set(sys.modules))"
    )
    assert "BatchNormalization in the file of" in shown
    assert shown.splitlines()[-1] == "set()"


def test_a_static_reading_is_the_same_whatever_reads_the_command_line(file: Path) -> None:
    past_typer = truenorm_command("inspect", str(file), "--json", "--static")
    through_it = truenorm_command("inspect", str(file), "--static", "--isolate", "--json")
    assert (past_typer.returncode, past_typer.stderr) == (0, "")
    assert (through_it.returncode, through_it.stdout) == (0, past_typer.stdout)
    lacking = [
        truenorm_command("inspect", "none.keras", "--static", *more) for more in ([], ["--isolate"])
    ]
    assert {one.returncode for one in lacking} == {2}
    assert lacking[0].stderr == lacking[1].stderr
    assert lacking[0].stderr.startswith("truenorm: There is no such .keras file (at 'none.keras'")
