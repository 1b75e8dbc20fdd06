"""Every layer and operation of Keras with huge numbers: does the isolated process hold its limit?

``python tests/torture/hostile.py [EACH]`` makes, for every layer that can be made with simple
arguments, a small model with it, enlarges each whole number of its configuration by itself to 500,
50,000 and a billion, and loads and runs the files in processes with 2 GiB: one process until a file
ends it, then the next. It prints how the files ended, and the most memory that a process took.
``EACH`` takes every so-manieth file only.
"""

from __future__ import annotations

import inspect
import json
import random
import resource
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import keras  # noqa: E402
import numpy as np  # noqa: E402
from altered_keras_files import CONFIG, with_config  # noqa: E402

import truenorm as tn  # noqa: E402
from truenorm._errors import is_out_of_memory  # noqa: E402
from truenorm.archive import _isolation, _limits  # noqa: E402
from truenorm.archive._classes import CODE  # noqa: E402

MEMORY = 2 * _limits.GIB
HUGE = (500, 50_000, 10**9)
SHAPES = ((8,), (8, 4), (8, 8, 3), (4, 4, 4, 2), (2, 4, 4, 4, 2))
SIMPLE: dict[str, Any] = {
    "units": 3, "filters": 3, "kernel_size": 2, "pool_size": 2, "size": 2, "rate": 0.1,
    "factor": 0.1,
    "padding": 1, "cropping": 1, "n": 2, "height": 4, "width": 4, "num_bins": 4, "num_tokens": 4,
    "input_dim": 4, "output_dim": 3, "dims": None, "target_shape": (-1,), "activation": "relu",
    "output_size": 2, "value_range": (0, 1), "stddev": 0.1, "max_boxes": 2, "num_heads": 2,
    "axes": 1, "scale": 2.0, "equation": "ab,bc->ac", "output_shape": 3,
}  # fmt: skip


def layers() -> Iterator[tuple[str, Any]]:
    """Small Sequential models, one for each layer that can be made so."""
    for name, kind in sorted(vars(keras.layers).items()):
        if not inspect.isclass(kind) or name in CODE or not issubclass(kind, keras.layers.Layer):
            continue
        needed = [
            one.name
            for one in inspect.signature(kind.__init__).parameters.values()
            if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
        ][1:]
        if not all(one in SIMPLE for one in needed):
            continue
        for shape in SHAPES:
            try:
                layer = kind(**{one: SIMPLE[one] for one in needed})
                yield name, keras.Sequential([keras.Input(shape), layer])
                break
            except Exception:  # noqa: S112 (another shape may do)
                continue


def enlarged(value: Any) -> Iterator[Any]:
    """The configuration with one number enlarged, for each of its numbers."""
    if type(value) is int and value > 0:
        yield from HUGE
    elif isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for inner in enlarged(value[key]):
                made = json.loads(json.dumps(value))
                made[key] = inner
                yield made


def run(folder: str, *, files: list[str]) -> None:
    """In the isolated process: load and call one after the other, and say how each went."""
    from truenorm.archive._loading import load_here

    with (Path(folder) / "told").open("w", buffering=1) as told:
        for file in files:
            signal.setitimer(signal.ITIMER_PROF, 60)  # of the processor, which may be busy
            signal.setitimer(signal.ITIMER_REAL, 600)
            doing = "loaded"
            try:
                model = load_here(file, max_parameters=200_000_000, imports=())
                doing = "run"
                model.predict_on_batch(np.zeros((2, *model.input_shape[1:]), "float32"))
                ended = "ran"
            except tn.TruenormError as error:
                ended = str(error).split(" (at")[0]
            except Exception as error:
                out = is_out_of_memory(error)
                ended = f"{'too much memory' if out else type(error).__name__} when {doing}"
            told.write(f"{ended}\n")


def written(folder: Path, each: int) -> tuple[list[str], set[str]]:
    """The files, and the layers that are in them."""
    base, files, names, number = folder / "base.keras", list[str](), set[str](), 0
    for name, model in layers():
        names.add(name)
        model.save(base)
        with zipfile.ZipFile(base) as file:  # where tuples are lists, as they are all looked into
            saved = json.loads(file.read(CONFIG))["config"]["layers"][-1]["config"]
        for config in enlarged(saved):
            number += 1
            if number % each == 0:
                path = folder / f"{number}-{name}.keras"
                files.append(str(path))

                def change(whole: Any, config: Any = config) -> None:
                    whole["config"]["layers"][-1].update(config=config)

                with_config(base, change, path)
    return files, names


def main(each: int = 1) -> int:
    """Try all, or every so-manieth; 1 if a process took more than it may."""
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        files, names = written(Path(temporary), each)
        random.Random(0).shuffle(files)  # noqa: S311 - so that a part of them is of all layers
        print(f"{len(names)} layers, {len(files)} files", flush=True)
        waiting = files
        while waiting:
            with _isolation.confined("hostile:run", {"files": waiting}, memory=MEMORY) as ended:
                told = (ended.folder / "told").read_text().splitlines()
                counted.update(told)
                if len(told) < len(waiting):
                    counted[f"ended its process with {ended.code}"] += 1
                    print("ended:", Path(waiting[len(told)]).stem, ended.code, flush=True)
                waiting = waiting[len(told) + 1 :]
                print(len(files) - len(waiting), "files", dict(counted.most_common(5)), flush=True)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"most memory of a process {most:.2f} GiB")
    for how, count in counted.most_common():
        print(f"{count:6} {how}")
    return 1 if most > 3 else 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    sys.exit(main(*map(int, sys.argv[1:])))
