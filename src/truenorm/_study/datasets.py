"""The data of a study: arrays, the user's function of the seed, or ready-made data by its name."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from truenorm._errors import DataError, MissingDependencyError
from truenorm._records.tables import counted

SKLEARN = ("digits", "breast_cancer", "wine", "diabetes")
KERAS = ("boston_housing", "california_housing", "cifar10", "cifar100", "fashion_mnist", "mnist")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
SHAPES = "(train, validation) or (train, validation, test)"
_KEYS = ("train", "validation", "test", "steps_per_epoch", "validation_steps", "test_steps")


@dataclass(frozen=True)
class Parts:
    """The data of one trial: each part is what ``fit`` takes.

    Args:
        train: To learn from; a pair of arrays, or what gives batches.
        validation: To judge each epoch, and the variants, by.
        test: Looked at once, after everything is decided; None if there is none.
        steps_per_epoch: Batches in an epoch, for data that does not end.
        validation_steps: The same for the validation part.
        test_steps: The same for the test part.
    """

    train: Any
    validation: Any
    test: Any = None
    steps_per_epoch: int | None = None
    validation_steps: int | None = None
    test_steps: int | None = None


def parts_of(data: Any) -> Parts:
    """What a data function returned, or a DataError that says what was expected."""
    if isinstance(data, Parts):
        return data
    if isinstance(data, Mapping):
        given = cast(Mapping[str, Any], data)
        if {"train", "validation"} <= given.keys() <= set(_KEYS):
            return Parts(**given)
    if isinstance(data, tuple | list):
        items: Any = tuple(cast(Any, data))
        if len(items) in (2, 3):
            return Parts(*items)
    raise DataError(
        "The data function did not give the parts of the data",
        where="data",
        expected=f"{SHAPES}, or a dict with the keys {', '.join(_KEYS)}",
        received=type(data).__name__,
        remedy="return these, each as fit takes it",
    )


def call(data: Callable[..., Any], seed: int, batch_size: int) -> Parts:
    """The data of a seed; ``batch_size`` goes to functions that take it."""
    takes = "batch_size" in inspect.signature(data).parameters
    return parts_of(data(seed, batch_size=batch_size) if takes else data(seed))


@dataclass(frozen=True)
class Ready:
    """Data by its name; called with a seed it gives stratified parts: 60% / 20% / 20%.

    Args:
        name: ``digits``, ``breast_cancer``, ``wine``, ``diabetes`` (all in scikit-learn);
            ``keras:`` and a name in ``keras.datasets``, such as ``keras:mnist``; an ``.npz`` file
            with ``x`` and ``y``; a ``.csv`` file, a colon, and the name of the target's column; or
            a folder with one folder of images for each class.
        image_size: Height and width that images of a folder are resized to.
    """

    name: str
    image_size: tuple[int, int] = (64, 64)

    def __call__(self, seed: int) -> Parts:
        path = Path(self.name)
        if self.name not in SKLEARN and path.is_dir():
            return _images(path, self.image_size, seed)
        if self.name.startswith("keras:"):
            return _keras(self.name.removeprefix("keras:"), seed)
        x, y = self._arrays()
        return _split(x, y, seed)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if self.name in SKLEARN:
            return _sklearn(self.name)
        if self.name.endswith(".npz"):
            return _npz(Path(self.name))
        file, _, target = self.name.rpartition(":")
        if file.endswith(".csv"):
            return _csv(Path(file), target)
        raise DataError(
            "There is no such data",
            where=self.name,
            expected=f"{', '.join(SKLEARN)}, keras:NAME, FILE.npz, FILE.csv:TARGET, or a folder "
            "with one folder of images for each class",
            remedy="give one of these, or a function from Python",
        )

    def is_known(self) -> bool:
        """Whether the name has a form that is known; its file may be missing."""
        kinds = (".npz", ".csv")
        return (
            self.name in SKLEARN
            or self.name.startswith("keras:")
            or self.name.endswith(kinds)
            or self.name.rpartition(":")[0].endswith(kinds)
            or ":" not in self.name
        )

    def identity(self) -> str:
        """A hash of the name, and of the files that it names."""
        made = hashlib.sha256(f"{self.name} {self.image_size}".encode())
        path = Path(self.name.rpartition(":")[0] if ".csv:" in self.name else self.name)
        if path.is_file():
            made.update(path.read_bytes())
        elif self.name not in SKLEARN and path.is_dir():
            for file in sorted(path.rglob("*")):
                size = file.stat().st_size if file.is_file() else 0
                made.update(f"{file.relative_to(path)} {size}".encode())
        return made.hexdigest()


def absolute(name: str) -> str:
    """A data set's name with the full path of its file, for a process in another folder."""
    path, mark, target = name.rpartition(":") if ".csv:" in name else (name, "", "")
    return f"{Path(path).resolve()}{mark}{target}" if Path(path).exists() else name


def _split(x: np.ndarray, y: np.ndarray, seed: int) -> Parts:
    """60% to learn from, 20% to validate, 20% to test; columns standardised by the training part.

    Classes have the same share in each part. Images (more than one axis per sample) are left.
    """
    if len(x) != len(y) or len(x) < 5:
        raise DataError(
            "The inputs and targets do not fit together, or are fewer than 5",
            where="data",
            received=f"{counted(len(x), 'input')}, {counted(len(y), 'target')}",
        )
    parts = _groups(y, seed)
    inputs = [x[rows].astype("float32") for rows in parts]
    if x.ndim == 2:
        mean, spread = inputs[0].mean(axis=0), inputs[0].std(axis=0)
        inputs = [(part - mean) / np.where(spread > 0, spread, 1) for part in inputs]
    targets = [y[rows] for rows in parts]
    if y.dtype.kind == "f":
        mean, spread = targets[0].mean(), targets[0].std() or 1.0
        targets = [((part - mean) / spread).astype("float32") for part in targets]
    pairs: Any = zip(inputs, targets, strict=True)
    return Parts(*pairs)


def _groups(y: np.ndarray, seed: int) -> list[np.ndarray]:
    """The rows of the three parts, class by class where ``y`` holds classes."""
    rng = np.random.default_rng([seed, len(y)])
    groups = [np.arange(len(y))]
    if y.dtype.kind in "biu":
        groups = [np.flatnonzero(y == label) for label in np.unique(y)]
    found: list[list[np.ndarray]] = [[], [], []]
    for group in groups:
        mixed = rng.permutation(group)
        ends = [round(0.6 * len(mixed)), round(0.8 * len(mixed))]
        for rows, part in zip(found, np.split(mixed, ends), strict=True):
            rows.append(part)
    return [rng.permutation(np.concatenate(rows)) for rows in found]


def _sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "This data comes inside scikit-learn, which is not installed",
            where=name,
            remedy='pip install "truenorm[demo]"',
        ) from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name == "digits":
        x = x.reshape(-1, 8, 8, 1) / 16
    return x, y.astype("float32" if name == "diabetes" else "int32")


def _keras(name: str, seed: int) -> Parts:
    """Keras's own training and test sets; a fifth of the training set is the validation part."""
    import keras

    if name not in KERAS:
        raise DataError(
            "There is no such data in keras.datasets",
            where=f"keras:{name}",
            expected=f"one of {', '.join(KERAS)}",
        )
    (x, y), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    x, x_test = (_pixels(part) for part in (x, x_test))
    y, y_test = (part.reshape(len(part)) for part in (y, y_test))
    if y.dtype.kind != "f":
        y, y_test = y.astype("int32"), y_test.astype("int32")
    train, *rest = _groups(y, seed)
    validation, more = rest
    train = np.concatenate([train, more])
    return Parts((x[train], y[train]), (x[validation], y[validation]), (x_test, y_test))


def _pixels(x: np.ndarray) -> np.ndarray:
    if x.ndim < 3:
        return x.astype("float32")
    return (x if x.ndim == 4 else x[..., None]).astype("float32") / 255


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            "The data file cannot be read",
            where=str(path),
            expected="an .npz file with the arrays x and y",
            received=str(error)[:200].rstrip("."),
        ) from error
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return x, y


def _csv(path: Path, target: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        head = path.read_text("utf-8-sig").splitlines()[0].split(",")
        values = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2, dtype="float64")
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            "The data file cannot be read",
            where=str(path),
            expected="a line of names, then numbers with commas between them",
            received=str(error)[:200].rstrip("."),
        ) from error
    names = [name.strip().strip('"') for name in head]
    if target not in names or not np.isfinite(values).all():
        raise DataError(
            "There is no such column" if target not in names else "A cell is not a finite number",
            where=f"{path}: {target}",
            expected=f"one of {', '.join(names)}" if target not in names else "numbers",
        )
    index = names.index(target)
    y = values[:, index]
    classes = bool((y == np.round(y)).all()) and len(np.unique(y)) <= max(2, len(y) // 20)
    x = np.delete(values, index, axis=1)
    if not classes:
        return x, y
    return x, np.unique(y, return_inverse=True)[1].astype("int32")


def _images(path: Path, size: tuple[int, int], seed: int) -> Parts:
    """Files in stratified parts; each image is read when its batch is."""
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    files = [[f for f in sorted(p.iterdir()) if f.suffix.lower() in IMAGES] for p in folders]
    if len(folders) < 2 or min(map(len, files)) < 3:
        raise DataError(
            "This is no folder of images by class",
            where=str(path),
            expected=f"two folders or more, each with 3 images or more ({', '.join(IMAGES)})",
            received=", ".join(
                f"{folder.name}: {len(found)}" for folder, found in zip(folders, files, strict=True)
            )
            or "no folder in it",
        )
    names = [str(file) for found in files for file in found]
    y = np.repeat(np.arange(len(files)), [len(found) for found in files]).astype("int32")
    groups = _groups(y, seed)
    pairs: Any = ((Files(tuple(names[i] for i in rows), size), y[rows]) for rows in groups)
    return Parts(*pairs)


class Files:
    """Images in files as if they were one array: rows are read, resized and scaled to 0 to 1.

    Args:
        paths: One file per sample.
        size: Height and width of every sample.
    """

    dtype = np.dtype("float32")

    def __init__(self, paths: tuple[str, ...], size: tuple[int, int]) -> None:
        self._paths = np.array(paths)
        self.shape = (len(paths), *size, 3)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: Any) -> np.ndarray:
        import keras

        size = self.shape[1:3]
        images = [keras.utils.load_img(path, target_size=size) for path in self._paths[rows]]
        return np.stack([np.asarray(image, "float32") for image in images]) / 255
