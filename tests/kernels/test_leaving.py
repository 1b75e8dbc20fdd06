"""Programs that leave the process or the device hold the framework's own operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from fresh_process import output_of
from layer_cases import array, error

from truenorm import BatchNormalization, domain
from truenorm._kernels import reference

BACKEND = keras.config.backend()
pytestmark = pytest.mark.usefixtures("where_keras_computes")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="about PyTorch")
RNG = np.random.default_rng(5)
X = RNG.normal(3, 2, (6, 4, 3)).astype("float32")
DY = RNG.normal(size=X.shape).astype("float32")

LAYERS: dict[str, dict[str, Any]] = {
    "last": {"activation": "relu"},
    "first": {"axis": 1, "bessel_correction": True},
    "masked": {"masked": True},
    "nothing": {"masked": True},
    "half": {"dtype": "mixed_bfloat16"},
    "forward": {},
}
MASKS = {"masked": RNG.random((6, 4)) < 0.6, "nothing": np.zeros((6, 4), bool)}


def step_of(layer: Any, mask: Any, *, learns: bool) -> Any:
    """A training step of the layer, as a TensorFlow function of input and gradient."""
    import tensorflow as tf

    spec = tf.TensorSpec((None, 4, 3), tf.float32)

    @tf.function(input_signature=[spec, spec], autograph=False)
    def step(x: Any, dy: Any) -> Any:
        x = tf.cast(x, layer.compute_dtype)
        if not learns:
            return {"y": layer(x, training=True)}
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        weights = [x, layer.gamma.value, layer.beta.value]
        found = tape.gradient(y, weights, tf.cast(dy, y.dtype))
        found += [v.value for v in layer.non_trainable_variables]
        return {"y": y} | dict(zip(("x", "gamma", "beta", "mean", "variance"), found, strict=True))

    return step


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What training steps give here, what they give where truenorm is not, and their file."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("saved")
    module = tf.Module()
    module.kept, here = [], {}
    for name, options in LAYERS.items():
        given = {key: value for key, value in options.items() if key != "masked"}
        layer: Any = BatchNormalization(momentum=0.5, **given)
        layer.build(X.shape)
        run = step_of(layer, MASKS.get(name), learns=name != "forward")
        module.kept += [v.value for v in layer.variables]
        setattr(module, name, run)
        before = [array(v).copy() for v in layer.variables]
        here[name] = {key: array(value) for key, value in run(X, DY).items()}
        for variable, value in zip(layer.variables, before, strict=True):
            variable.assign(value)
    signatures = {name: getattr(module, name).get_concrete_function() for name in LAYERS}
    quick = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(folder), signatures, quick)
    np.savez(folder / "data.npz", X, DY)
    program = (
        "import sys, numpy as np, tensorflow as tf\n"
        "folder = sys.argv[1]; module = tf.saved_model.load(folder)\n"
        "x, dy = np.load(f'{folder}/data.npz').values()\n"
        "for name in module.signatures:\n"
        "    found = getattr(module, name)(x, dy)\n"
        "    found = {k: np.float64(tf.cast(v, tf.float64)) for k, v in found.items()}\n"
        "    np.savez(f'{folder}/{name}.npz', **found)\n"
        "assert 'truenorm' not in sys.modules\n"
    )
    output_of(program, folder)
    there = {name: dict(np.load(folder / f"{name}.npz")) for name in LAYERS}
    return here, there, folder


@pytest.mark.long
@on_tensorflow
@pytest.mark.parametrize("name", LAYERS)
def test_a_saved_model_trains_where_truenorm_is_not(name: str, saved: Any) -> None:
    here, there, _ = saved
    bound = 2.0**-7 if name == "half" else 1e-6
    assert there[name].keys() == here[name].keys()
    for key, value in there[name].items():
        assert error(value, here[name][key]) <= bound, key


@pytest.mark.long  # as the test before: they share what takes seconds
@on_tensorflow
def test_what_it_gives_is_right(saved: Any) -> None:
    true = reference.forward(X, axis=1)
    for found in saved[:2]:
        assert error(found["first"]["y"], true.output) < 1e-6
        want = reference.backward(DY, X, axis=1)
        assert error(found["first"]["x"], want.x) < 1e-6
        assert error(found["first"]["mean"], true.mean / 2) < 1e-6
        unbiased = true.variance * true.count / (true.count - 1)
        assert error(found["first"]["variance"], 0.5 + unbiased / 2) < 1e-6
        np.testing.assert_allclose(found["nothing"]["y"], X / np.sqrt(1.001), rtol=1e-6)
        np.testing.assert_array_equal(found["nothing"]["mean"], np.zeros(3))


@on_tensorflow
def test_tensorflow_lite_trains_on_the_device(saved: Any) -> None:
    import tensorflow as tf

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((6, 3), tf.float32)])
        def train(self, x: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((layer(x, training=True) - 1) ** 4)
            weights = [layer.gamma.value, layer.beta.value]
            for weight, change in zip(weights, tape.gradient(loss, weights), strict=True):
                weight.assign_sub(0.01 * change)
            return {"loss": loss}

    layer: Any = BatchNormalization()
    layer.build((None, 3))
    module, x = Module(), X[:, 0]
    module.kept = [v.value for v in layer.variables]
    before = [array(v).copy() for v in layer.variables]
    here = [float(module.train(x)["loss"]) for _ in range(3)]
    for variable, value in zip(layer.variables, before, strict=True):
        variable.assign(value)
    folder = str(saved[2] / "lite")
    tf.saved_model.save(module, folder, {"train": module.train.get_concrete_function()})
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.experimental_enable_resource_variables = True
    with pytest.warns(UserWarning, match="Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(model_content=converter.convert())
    train = interpreter.get_signature_runner("train")
    np.testing.assert_allclose([train(x=x)["loss"] for _ in range(3)], here, rtol=1e-5)
    assert here[2] < here[0]


@on_jax
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_an_exported_step_holds_operations_of_jax(learns: bool, masked: bool) -> None:
    import jax

    layer: Any = BatchNormalization(momentum=0.5)
    layer.build((None, 4, 3))
    weights = [v.value for v in layer.trainable_variables]
    moving = [v.value for v in layer.non_trainable_variables]

    def call(weights: Any, x: Any, mask: Any) -> Any:
        y, moved = layer.stateless_call(
            *(weights, moving, x), training=True, mask=mask if masked else None
        )
        return (y**3).sum(), (y, moved)

    step = jax.jit(jax.value_and_grad(call, (0, 1), has_aux=True) if learns else call)
    mask = RNG.random((6, 4)) < 0.6
    here = jax.tree.leaves(step(weights, X, mask))
    assert "tn_xla_moments" in step.lower(weights, X, mask).as_text()
    size = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((*size, *a.shape[1:]), a.dtype) for a in (X, mask)]
    for given in ((X, mask), shapes):
        for platforms in (None, ("cpu", "tpu")):
            exported = jax.export.export(step, platforms=platforms)(weights, *given)
            there = jax.export.deserialize(exported.serialize()).call(weights, X, mask)
            for have, want in zip(jax.tree.leaves(there), here, strict=True):
                assert error(array(have), array(want)) < 1e-5
    for platforms in (("tpu",), ("cuda",), ("cpu", "tpu")):
        lowered = step.trace(weights, X, mask).lower(lowering_platforms=platforms)
        assert "tn_xla_moments" not in lowered.as_text()


def torch_layer() -> Any:
    layer: Any = BatchNormalization()
    layer.build((None, 4, 3))
    return layer


@on_torch
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_step_of_pytorch(mode: str) -> None:
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = torch_layer()

    def step(x: Any) -> Any:
        x = x.detach().requires_grad_()
        y = layer(x, training=True)
        return y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y) * x.detach() ** 2)

    x = torch.tensor(X)
    traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)  # type: ignore[arg-type]
    y, d_x = traced(x)
    assert error(array(y), reference.forward(X).output) < 1e-6
    assert error(array(d_x), reference.backward(X**2, X).x) < 1e-5


@on_torch
def test_tensors_without_numbers() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = torch_layer()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.tensor(X)).requires_grad_()
        y = layer(x, training=True)
        y.sum().backward()
    assert y.shape == x.grad.shape == X.shape


@on_torch
@pytest.mark.parametrize("training", [False, True])
def test_domains_in_a_mode_that_takes_no_tensor_from_outside(training: bool) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = BatchNormalization(domains=2)
        layer.build(X.shape)
        x = torch.empty(X.shape)
        with domain(1):
            assert layer(x, training=training).shape == X.shape
        assert layer(x, training=training, domain=1).shape == X.shape
    real = BatchNormalization(domains=2, momentum=0.0)  # what all layers share is not of that mode
    with domain(1):
        real(torch.tensor(X), training=True)
    assert error(array(real.moving_mean)[1], X.mean((0, 1))) < 1e-6
    assert (array(real.moving_mean)[0] == 0).all()


@on_torch
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_step_of_pytorch(dynamic: bool) -> None:
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch_layer()

        def forward(self, x: Any) -> Any:
            return self.layer(x, training=True)

    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    exported = torch.export.export(Module(), (torch.tensor(X),), dynamic_shapes=shapes)
    x = np.concatenate([X, X + 1]) if dynamic else X
    y = exported.module()(torch.tensor(x))
    assert error(array(y.detach()), reference.forward(x).output) < 1e-6


@on_torch
def test_function_transforms() -> None:
    import torch

    layer, x = torch_layer(), torch.tensor(X)
    moving = [v.value.detach() for v in layer.non_trainable_variables]
    weights = [v.value.detach() for v in layer.trainable_variables]

    def loss(weights: Any, x: Any) -> Any:
        y, _ = layer.stateless_call(weights, moving, x, training=True)
        return (y * torch.tensor(DY)).sum()

    gradient = torch.func.grad(loss, (0, 1))
    each = torch.func.vmap(gradient, (None, 0))(weights, torch.stack([x, 2 * x]))
    true = reference.backward(DY, X)
    for found in (gradient(weights, x), torch.utils._pytree.tree_map(lambda t: t[0], each)):
        for have, want in zip((*found[0], found[1]), (true.gamma, true.beta, true.x), strict=True):
            assert error(array(have), want) < 1e-5
    _, change = torch.func.jvp(lambda x: loss(weights, x), (x,), (torch.tensor(DY),))
    assert float(change) == pytest.approx((true.x * DY).sum(), rel=1e-4)
    hessian = torch.func.hessian(lambda x: loss(weights, x) ** 2)(x)
    torch.testing.assert_close(hessian, hessian.permute(3, 4, 5, 0, 1, 2), atol=1e-3, rtol=1e-7)
    assert float(hessian.abs().max()) > 0.1
    same = torch.func.functionalize(loss)(weights, x)
    assert float(same) == pytest.approx(float(loss(weights, x)), rel=1e-5)


@on_torch
def test_who_watches_sees_no_call_of_its_own_kind() -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watched(torch.Tensor):
        pass

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    layer, x = torch_layer(), torch.tensor(X)
    with Watch():
        layer(x, training=True)
    assert len(seen) > 10
    assert not [name for name in seen if "batch_norm" in name]
    assert type(layer(x.as_subclass(Watched), training=True)) is Watched
