"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
wanted = set(project["dependencies"])
for extra, requirements in project["optional-dependencies"].items():
    if extra not in ("test", "lint", "docs"):  # tools, of which no version is promised
        wanted |= set(requirements)
for requirement in sorted(wanted):
    if found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement):
        print("==".join(found.groups()))
