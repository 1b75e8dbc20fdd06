"""Writing in place: what stays of the old file, what is left behind, what is refused."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

import truenorm as tn
from truenorm._records import files
from truenorm._records.files import owned_name, remove_abandoned, replacing, temporary_folder

pytestmark = pytest.mark.any_backend


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Generator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o660, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(kept: int, tmp_path: Path, umask: None) -> None:
    del umask
    path = tmp_path / "model.keras"
    path.write_bytes(b"old")
    path.chmod(kept)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600  # nobody reads over our shoulder meanwhile
        temporary.write_bytes(b"new")
    assert (mode(path), path.read_bytes()) == (kept, b"new")


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, umask: None) -> None:
    del umask
    write(tmp_path / "model.keras")
    assert mode(tmp_path / "model.keras") == 0o640


def test_the_owner_is_kept_where_the_system_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(b"old")
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "chown", lambda _, user, group: given.append((user, group)))
    write(path)
    assert given == [(path.stat().st_uid, path.stat().st_gid)]

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", refused)
    write(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_symbolic_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "model.keras", tmp_path / "link.keras"
    link.symlink_to(target)
    write(link)  # which points at nothing yet
    assert (target.read_bytes(), link.is_symlink()) == (b"new", True)
    write(link, b"newer")
    assert (target.read_bytes(), link.is_symlink()) == (b"newer", True)
    circle = tmp_path / "circle.keras"
    circle.symlink_to(circle)
    with pytest.raises(tn.OutputError, match="The file cannot be written"):
        write(circle)


def test_of_a_hard_link_this_name_gets_the_new_file(tmp_path: Path) -> None:
    path, other = tmp_path / "model.keras", tmp_path / "other.keras"
    path.write_bytes(b"old")
    other.hardlink_to(path)
    write(path)
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.keras")
    (tmp_path / "folder.keras").mkdir()
    for path in (tmp_path / "pipe.keras", tmp_path / "folder.keras", Path("/dev/null")):
        with pytest.raises(tn.OutputError) as refused:
            write(path)
        assert "Received: it is no file, but a folder, a pipe or a device." in str(refused.value)
    assert (tmp_path / "pipe.keras").is_fifo()
    assert (tmp_path / "folder.keras").is_dir()
    assert Path("/dev/null").is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.keras", "pipe.keras"]


def killed_in_the_middle(path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from truenorm._records.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half a')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL


def test_what_killed_processes_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "model[1].keras"
    path.write_bytes(b"old")
    for _ in range(3):
        killed_in_the_middle(path)
        assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2  # each removes what the one before left
    mine = f".model[1].{owned_name()}.tmp.keras"  # of this process, which lives
    others = [".other.tmp.keras", ".model[1].0123456789ab.tmp.keras", "model[1].txt", mine]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    write(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, path.name])
    assert path.read_bytes() == b"new"


def test_a_killed_process_leaves_its_temporary_folder_to_the_next_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal\n"
        "from truenorm._records.files import temporary_folder\n"
        "with temporary_folder() as folder:\n"
        "    (folder / 'trial.json').write_bytes(b'{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    here = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=here)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_what_another_machine_left_is_not_ours_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_the_middle(tmp_path / "model.keras")
    monkeypatch.setattr(files, "_machine", lambda: "00000000")
    remove_abandoned(tmp_path, ".model.", ".tmp.keras")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_file_and_then_its_folder_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write(tmp_path / "model.keras")
    assert Path(synced[0]).name.endswith(".tmp.keras")
    assert synced[1] == str(tmp_path)
