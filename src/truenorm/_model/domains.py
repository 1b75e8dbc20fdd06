"""Models whose BatchNormalization has several domains: of one of them, as a model like any other.

What the tools measure and compute is about one mean and one variance for each layer. So they work
on a model of one domain, in which a layer is an ordinary one with the weights of that domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from truenorm._checks import check_integer
from truenorm._errors import ModelError, OptionError
from truenorm._kernels import replicas
from truenorm._layer.domains import current, has_rows
from truenorm._model.edit import Piece, from_config
from truenorm._model.rebuild import rebuild
from truenorm._model.sites import batch_normalizations
from truenorm._model.values import kept, numbers


def require_one_domain(layers: Mapping[Any, str]) -> None:
    """Refuse layers with several domains, of which a tool would know only numbers for all."""
    for layer, path in layers.items():
        if _domains_of(layer) is not None:
            raise ModelError(
                "This BatchNormalization has statistics for several domains",
                where=path,
                expected="one mean and one variance for each channel",
                received=f"domains={layer.domains}",
                remedy="name one of them: collect, recalibrate, adapt, diagnose and fold take "
                "domain=0",
            )


def of_domain(model: Any, domain: int) -> Any:
    """A new model with the weights of one domain, in layers that have no others.

    Args:
        model: A built model, of which some layers have domains.
        domain: Which; layers without domains stay as they are.

    Raises:
        OptionError: No layer has domains, or one has too few.
    """
    several = check_domain(model, domain)
    return rebuild(model, {layer: [_piece(layer, domain)] for layer in several})


def check_domain(model: Any, domain: int) -> dict[Any, str]:
    """The layers with domains, and their paths, if all have this one.

    Raises:
        OptionError: No layer has domains, or one has too few.
    """
    check_integer("domain", domain, least=0)
    several = _several(model)
    for layer, path in several.items():
        if domain >= layer.domains:
            raise OptionError(
                "BatchNormalization has no such domain",
                where=path,
                expected=f"one of its {layer.domains} domains, from 0 to {layer.domains - 1}",
                received=f"domain {domain}",
            )
    return several


def put_back(model: Any, single: Any, domain: int) -> Callable[[], None]:
    """Give a domain of a model the weights of the model that :func:`of_domain` made; the undo."""
    paths = {path: layer for layer, path in batch_normalizations(single).items()}
    pairs = [
        (old, new)
        for layer, path in batch_normalizations(model).items()
        for old, new in zip(_weights(layer), _weights(paths[path]), strict=True)
    ]
    before = [kept(old) for old, _ in pairs]

    def undo() -> None:
        for restore in before:
            restore()

    try:
        for old, new in pairs:
            row = domain if len(old.shape) > len(new.shape) else ...
            for part in replicas.parts(old):  # whose rows of other domains may differ
                values = numbers(part)
                values[row] = numbers(new)
                part.assign(values)
    except BaseException:  # Ctrl-C included: all or nothing
        undo()
        raise
    return undo


def _domains_of(layer: Any) -> int | None:
    return getattr(layer, "domains", None)


def _several(model: Any) -> dict[Any, str]:
    """The layers with domains, and their paths."""
    found = {k: path for k, path in batch_normalizations(model).items() if _domains_of(k)}
    if not found:
        raise OptionError(
            "No BatchNormalization of this model has domains",
            where="domain",
            expected="a model with layers that were made with domains=n",
            received="a domain",
        )
    return found


def _piece(layer: Any, domain: int) -> Piece:
    values = [
        numbers(weight)[domain] if has_rows(layer, weight.name) else numbers(weight)
        for weight in _weights(layer)
    ]
    new = from_config(layer, type(layer), domains=None, domain_affine=False)
    return Piece(new, layer, values)


def _weights(layer: Any) -> list[Any]:
    """In the order of Keras; on JAX the variable that says which domain is among ``variables``."""
    return [variable for variable in layer.variables if variable is not current()]
