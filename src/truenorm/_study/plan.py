"""What every trial of a study runs: the functions that make its model, its data and its callbacks.

Functions travel by cloudpickle, those of the user's own scripts and modules by their code, so that
a process elsewhere need not find the file that they stand in.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truenorm._errors import OptionError
from truenorm._records.files import replacing
from truenorm._study.datasets import Parts, call
from truenorm._study.identity import is_of_a_library
from truenorm._study.variants import Variant

PLAN = "plan.pkl"


@dataclass(frozen=True)
class Plan:
    """The functions of a study.

    Args:
        build: Gives the compiled model; called without arguments, or with the shape of the data
            (:class:`truenorm._study.models.Named`).
        data: A function of the seed; None where the data is arrays, which are kept apart.
        variants: By name.
        callbacks: Gives the callbacks of one training; None: none.
    """

    build: Callable[..., Any]
    data: Callable[..., Any] | None
    variants: Mapping[str, Variant]
    callbacks: Callable[[], Any] | None = None

    def parts(self, arrays: Parts | None, seed: int, batch_size: int) -> Parts:
        """The data of one trial."""
        if self.data is not None:
            return call(self.data, seed, batch_size)
        assert arrays is not None  # noqa: S101 - one of the two is always there
        return arrays

    def to_bytes(self) -> bytes:
        """The plan for another process."""
        import cloudpickle

        changes = [v.change for v in self.variants.values() if callable(v.change)]
        with _by_value([self.build, self.data, self.callbacks, *changes]):
            try:
                return cloudpickle.dumps(self)
            except (TypeError, AttributeError, pickle.PicklingError) as error:
                raise OptionError(
                    "A function of this study cannot be sent to the trials",
                    where="build, data, variants or callbacks",
                    expected="functions whose values can be pickled",
                    received=str(error),
                    remedy="make in the function what it closes over: a model, a file, a lock",
                ) from error

    def write(self, folder: Path) -> None:
        """Write the plan to its place in the folder."""
        content = self.to_bytes()
        with replacing(folder / PLAN) as temporary:
            temporary.write_bytes(content)


def read_plan(folder: Path) -> Plan:
    """The plan that the driver of this study wrote."""
    return pickle.loads((folder / PLAN).read_bytes())  # noqa: S301 - written by our own driver


@contextmanager
def _by_value(functions: list[Any]) -> Generator[None]:
    """Pickle what the user's own modules hold by its code, not by its name."""
    import cloudpickle

    names = {getattr(function, "__module__", None) or "" for function in functions}
    modules = [
        module
        for name in names - {"__main__"}
        if (module := sys.modules.get(name)) is not None and not is_of_a_library(module)
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
