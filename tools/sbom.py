"""What is installed with truenorm, as a CycloneDX 1.5 list of components; and their licences.

``python tools/sbom.py [FILE]`` reads the metadata of the installed packages, follows what truenorm
and its extras require, writes the list, and ends with exit code 1 where a licence is not one of
those that are known to fit an Apache-2.0 program. Nothing is downloaded and nothing is sent.

Known faults of the components are looked up elsewhere, with a network:
``pip-audit --disable-pip -r constraints.txt``.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = "truenorm"
PERMISSIVE = re.compile(
    r"apache|\bmit\b|\bbsd\b|\bpsf\b|python software|\bisc\b|mpl|mozilla|\bzlib\b|unlicense"
    r"|public domain|\bhpnd\b|\bcc0\b|boost|0bsd|mit-cmu",
    re.IGNORECASE,
)


def name_of(requirement: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", requirement).lower()


def needed() -> dict[str, Distribution]:
    """Everything that truenorm and its extras require and that is installed here."""
    found: dict[str, Distribution] = {}
    extras = distribution(ROOT).metadata.get_all("Provides-Extra") or []
    waiting = [(ROOT, tuple(extras))]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            found[name] = one = distribution(name)
        except PackageNotFoundError:
            continue
        for text in one.requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in (*wanted, "")):
                waiting.append((name_of(requirement.name), tuple(sorted(requirement.extras))))
    return found


def licence_of(one: Distribution) -> str:
    """What the metadata says: an expression, a classifier or a field; else the licence's text."""
    metadata = one.metadata
    classifiers = [
        text.rsplit(" :: ", 1)[-1]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License :: OSI Approved ::")
    ]
    field = (metadata.get("License") or "").strip().split("\n", 1)[0][:60]
    said = metadata.get("License-Expression") or ", ".join(classifiers) or field
    return said or _title(one) or "unknown"


def _title(one: Distribution) -> str:
    """What the file of the licence says."""
    sentences = {
        "Apache License": "Apache License",
        "Permission is hereby granted, free of charge": "MIT",
        "Redistribution and use in source and binary forms": "BSD",
    }
    for name in one.metadata.get_all("License-File") or []:
        text = " ".join((one.read_text(f"licenses/{name}") or one.read_text(name) or "").split())
        for sentence, licence in sentences.items():
            if sentence in text:
                return licence
    return ""


def component(name: str, one: Distribution) -> dict[str, Any]:
    """One package as CycloneDX has it."""
    purl = f"pkg:pypi/{name}@{one.version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": one.version,
        "purl": purl,
        "licenses": [{"license": {"name": licence_of(one)}}],
    }


def main(*arguments: str) -> int:
    """Write the list; gives the exit code."""
    packages = needed()
    own = packages.pop(ROOT)
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {**component(ROOT, own), "type": "application"}},
        "components": [component(name, one) for name, one in sorted(packages.items())],
    }
    text = json.dumps(bom, indent=1) + "\n"
    if arguments:
        Path(arguments[0]).write_text(text, "utf-8")
    else:
        sys.stdout.write(text)
    strange = {name: licence_of(one) for name, one in packages.items()}
    strange = {name: text for name, text in strange.items() if not PERMISSIVE.search(text)}
    for name, text in sorted(strange.items()):
        print(f"licence to look at: {name}: {text}", file=sys.stderr)
    print(f"{len(packages)} components", file=sys.stderr)
    return 1 if strange else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
