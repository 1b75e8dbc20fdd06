"""Builds the compiled passes (``src/truenorm/_kernels/native``); all else is in pyproject.toml.

They are a plain shared library that knows neither Python nor any framework: one build serves all.
The compiler is the machine's own (``CC``, cc, gcc or clang) or, where none of them can do it, that
of Zig, which is a package. Without the library truenorm works by the frameworks' operations.

``TRUENORM_NATIVE=0`` leaves it out. For developers: with ``TRUENORM_STRICT=1`` a warning is an
error, and so is a failed build; ``TRUENORM_SANITIZE`` names sanitizers of the compiler. With
``TRUENORM_TARGET`` Zig compiles for another Linux: ``x86_64-linux-gnu.2.17`` is any with a glibc
from 2012 on, which is what a wheel for others needs, and ``aarch64-linux-gnu.2.17`` that on ARM.
"""

import functools
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/truenorm/_kernels/native")
FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
TARGET = os.environ.get("TRUENORM_TARGET")
HOST = platform.machine().lower()
MACHINE = (
    TARGET.split("-")[0] if TARGET else {"amd64": "x86_64", "arm64": "aarch64"}.get(HOST, HOST)
)
# Levels of the processor; which one is used is decided when the library is loaded.
LEVELS = {"v1": []}
if MACHINE == "x86_64":
    LEVELS["v3"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["v4"] = [*LEVELS["v3"], *(f"-mavx512{k}" for k in ("f", "bw", "cd", "dq", "vl"))]
    LEVELS["v4"] += ["-mprefer-vector-width=512", "-DTN_NARROW"]
STRICT = os.environ.get("TRUENORM_STRICT") == "1"
if STRICT:
    FLAGS += ["-Wall", "-Wextra", "-Werror"]
SANITIZE: list[str] = []
if sanitizers := os.environ.get("TRUENORM_SANITIZE"):
    SANITIZE += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZE]
PROBE = "#include <pthread.h>\n#include <stdatomic.h>\nint main(void) { return 0; }\n"


@functools.cache
def own_compiler() -> list[str] | None:
    """The machine's C compiler, if it makes programs."""
    if TARGET:
        return None
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        command = shlex.split(name or "")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(PROBE)
            line = [*command, str(source), "-lpthread", "-o", str(source.with_suffix(""))]
            try:
                if command and subprocess.run(line, capture_output=True).returncode == 0:
                    return command
            except OSError:
                continue
    return None


def zig() -> list[str]:
    """Zig's C compiler, for any processor of this kind; else it would be for this very one."""
    system = "macos" if sys.platform == "darwin" else "linux"
    library = {"linux": "-gnu" if platform.libc_ver()[0] == "glibc" else "-musl"}.get(system, "")
    target = TARGET or f"{MACHINE}-{system}{library}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", target]


class BuildLibrary(build_ext):
    """A shared library in the place of an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the Python version in its name: it knows nothing of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Build it; on failure, say so and leave it out."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.compile(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if STRICT:
                raise
            for left in (target, NATIVE / target.name):  # none at all rather than an old one
                left.unlink(missing_ok=True)
            print(f"truenorm: without its compiled passes ({error})", file=sys.stderr)

    def compile(self, target: Path) -> None:
        """Compile the passes once for each level, all else once, and link them."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        compiler = own_compiler() or zig()
        environment = {"ZIG_GLOBAL_CACHE_DIR": str(folder.resolve()), **os.environ}
        units = [(name, []) for name in ("threads", "entry", "jax", "tensorflow")]
        units += [("batchnorm", [f"-DTN_LEVEL=_{k}", *more]) for k, more in LEVELS.items()]
        objects: list[str] = []
        for name, more in units:
            objects.append(str(folder / f"{name}{len(objects)}.o"))
            line = [*compiler, *FLAGS, *more, "-c", str(NATIVE / f"{name}.c"), "-o", objects[-1]]
            subprocess.run(line, check=True, env=environment)
        link = ["-shared", *SANITIZE, *objects]
        if sys.platform.startswith("linux") and not SANITIZE:
            link.append("-Wl,--strip-all")
        line = [*compiler, *link, "-lm", "-lpthread", "-ldl", "-o", str(target)]
        subprocess.run(line, check=True, env=environment)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python."""

    def finalize_options(self) -> None:
        """Windows has no passes and still a wheel of its own, which no other system will take."""
        if TARGET and self.plat_name is None:
            self.plat_name = f"linux-{MACHINE}"
        super().finalize_options()
        self.root_is_pure = self.root_is_pure and sys.platform != "win32"

    def get_tag(self) -> tuple[str, str, str]:
        """Such a wheel's tag."""
        return "py3", "none", super().get_tag()[2]


supported = sys.platform.startswith("linux") or sys.platform == "darwin"
supported = supported and os.environ.get("TRUENORM_NATIVE") != "0"
library = Extension("truenorm._kernels.native.libtruenorm", [], optional=True)
setup(
    ext_modules=[library] if supported else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    setup_requires=[] if own_compiler() or not supported else ["ziglang>=0.13"],
)
