"""What ``setup.py`` builds on which system, without building it."""

from __future__ import annotations

import platform
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools.dist import Distribution

pytestmark = pytest.mark.any_backend

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the file on some system; gives its names and what it hands to setuptools."""

    sysconfig.get_config_vars()  # it is read once, and by the name of the system

    def run(system: str, machine: str, **environment: str) -> tuple[dict[str, Any], dict[str, Any]]:
        given: dict[str, Any] = {}
        for name in ("TRUENORM_NATIVE", "TRUENORM_TARGET", "TRUENORM_STRICT", "TRUENORM_SANITIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(setuptools, "setup", given.update)
        return runpy.run_path(str(SETUP)), given

    return run


def tag(given: dict[str, Any], own: str) -> str:
    """The tag of the wheel, on a system that calls itself so."""
    command = given["cmdclass"]["bdist_wheel"](Distribution({"ext_modules": given["ext_modules"]}))
    command.set_undefined_options = lambda *_: setattr(  # the build's platform is this one's
        command, "plat_name", command.plat_name or own
    )
    command.ensure_finalized()
    return "-".join(command.get_tag())


def test_windows_has_a_wheel_of_its_own_without_the_library(setup: Any) -> None:
    _, given = setup("win32", "AMD64")
    assert given["ext_modules"] == []
    assert given["setup_requires"] == []
    assert tag(given, "win-amd64") == "py3-none-win_amd64"


def test_a_wheel_without_the_library_is_for_any_system(setup: Any) -> None:
    _, given = setup("linux", "x86_64", TRUENORM_NATIVE="0")
    assert given["ext_modules"] == []
    assert tag(given, "linux-x86_64") == "py3-none-any"


@pytest.mark.parametrize(
    ("machine", "levels"),
    [("x86_64", ["v1", "v3", "v4"]), ("aarch64", ["v1"]), ("riscv64", ["v1"])],
)
def test_a_wheel_with_the_library_is_for_one_system(
    setup: Any, machine: str, levels: list[str]
) -> None:
    names, given = setup("linux", machine)
    assert list(names["LEVELS"]) == levels
    assert len(given["ext_modules"]) == 1
    assert tag(given, f"linux-{machine}") == f"py3-none-linux_{machine}"


@pytest.mark.parametrize(
    ("own", "target", "levels"),
    [("x86_64", "aarch64", ["v1"]), ("aarch64", "x86_64", ["v1", "v3", "v4"])],
)
def test_a_library_for_another_processor_is_of_that_processor(
    setup: Any, own: str, target: str, levels: list[str]
) -> None:
    names, given = setup("linux", own, TRUENORM_TARGET=f"{target}-linux-gnu.2.17")
    assert list(names["LEVELS"]) == levels
    assert names["zig"]()[-1] == f"{target}-linux-gnu.2.17"
    assert given["setup_requires"] == ["ziglang>=0.13"]
    assert tag(given, f"linux-{own}") == f"py3-none-linux_{target}"


@pytest.mark.parametrize("machine", ["arm64", "x86_64"])
def test_macos_has_the_library(setup: Any, machine: str) -> None:
    names, given = setup("darwin", machine)
    assert len(given["ext_modules"]) == 1
    wanted = {"arm64": "aarch64-macos", "x86_64": "x86_64-macos"}
    assert names["zig"]()[-1] == wanted[machine]
