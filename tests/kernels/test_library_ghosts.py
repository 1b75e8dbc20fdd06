"""Ghost batches in the compiled passes by themselves: each group as a batch of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import error
from test_library import EPS, TYPES, address

from truenorm._kernels import library, reference

pytestmark = pytest.mark.any_backend

# (outer, groups, run, width): rows that end inside a block, groups of several chunks, and panels
SHAPES = [
    *((1, 3, 1, 2), (8, 5, 1, 33), (8, 16, 1, 40), (9, 2, 1, 600), (7, 3, 3, 5), (9, 3, 65, 4)),
    *((70, 2, 1, 3), (300, 3, 2, 80), (8, 4, 784, 40)),
]


def step(x: Any, dy: Any, weights: Any, *, relu: bool = False, threads: int = 2) -> dict[str, Any]:
    """Forward and backward; what is around the results stays as it was."""
    outer, groups, run, width = x.shape
    wide = np.float64 if x.dtype == np.float64 else np.float32
    names = ("mean", "variance", "low", "rstd", "dgamma", "dbeta")
    rows = np.full((8, groups * width), 77, wide)
    y, dx = (np.full((x.size + 16), 77, x.dtype) for _ in range(2))
    gamma, beta = (np.ascontiguousarray(w, wide) for w in weights)
    call = library.Call(
        *(outer, groups * width, 1, library.DTYPES[x.dtype.name]),
        relu=relu,
        threads=threads,
        epsilon=1e-3,
        parallel=library.own_threads(),
        x=address(x),
        dy=address(dy),
        gamma=address(gamma),
        beta=address(beta),
        groups=groups,
        run=run,
    )
    call = call._replace(**{name: address(row) for name, row in zip(names, rows[1:7], strict=True)})
    library.run("tn_forward", call._replace(y=address(y[8:])))
    library.run("tn_backward", call._replace(y=address(dx[8:])))
    for around in (y[:8], y[-8:], dx[:8], dx[-8:], rows[0], rows[7]):
        assert (np.float32(around) == 77).all()
    found = {"y": y[8:-8].reshape(x.shape), "dx": dx[8:-8].reshape(x.shape)}
    by_group = (row.reshape(groups, width) for row in rows[1:7])
    return found | dict(zip(names, by_group, strict=True))


def draw(shape: tuple[int, ...], dtype: str, mean: float = 0.5) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(m, 1.5, shape).astype(TYPES[dtype]) for m in (mean, 0))
    return x, dy, (rng.uniform(0.5, 2, shape[1::2]), rng.normal(size=shape[1::2]))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_group_is_the_oracles(shape: tuple[int, ...], dtype: str, relu: bool) -> None:
    x, dy, weights = draw(shape, dtype)
    weights = tuple(np.float64(np.float32(w)) for w in weights)
    have = step(x, dy, weights, relu=relu)
    one, wide = (16 * EPS[dtype],) * 2 if dtype == "float64" else (EPS[dtype], EPS["float32"])
    for g in range(shape[1]):
        mine, gamma, beta = np.float64(x[:, g]), weights[0][g], weights[1][g]
        true = reference.forward(mine, gamma, beta, axis=-1)
        upstream = np.float64(dy[:, g]) * ((true.output > 0) if relu else 1)
        want = reference.backward(upstream, mine, gamma, axis=-1)
        output = np.maximum(true.output, 0) if relu else true.output
        assert error(have["y"][:, g], output) < 2 * one
        mean = np.float64(have["mean"][g]) + have["low"][g]
        assert np.abs(mean - true.mean).max() <= 2 * wide * np.sqrt(true.variance).max()
        assert error(have["variance"][g], true.variance) < 2 * wide
        size = np.abs(np.float64(dy)).max() * np.abs(gamma * have["rstd"][g]).max()
        assert np.abs(np.float64(have["dx"][:, g]) - want.x).max() < 2 * one * size
        most = np.abs(np.float64(dy[:, g])).sum((0, 1)).max()
        assert np.abs(have["dgamma"][g] - want.gamma).max() < 4 * wide * most
        assert np.abs(have["dbeta"][g] - want.beta).max() < 4 * wide * most


@pytest.mark.parametrize("shape", [(9, 2, 65, 300), (8, 64, 1, 600)], ids=str)
def test_the_same_bits_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    one, *others = (step(*draw(shape, "float32"), threads=n) for n in (1, 2, 3, 64))
    for other in others:
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("shape", [(9, 2, 65, 8), (8, 6, 1, 8), (8, 3, 4, 8)], ids=str)
def test_a_large_mean_costs_no_digits(shape: tuple[int, ...]) -> None:
    x, dy, weights = draw(shape, "float32", mean=1000)
    have = step(x, dy, weights)
    for g in range(shape[1]):
        true = reference.forward(x[:, g], axis=-1)
        assert error(have["variance"][g], true.variance) < 2 * EPS["float32"]
