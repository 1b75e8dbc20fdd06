"""TensorFlow: a function that runs in one way here, and in TensorFlow's operations elsewhere.

A graph may leave the process long after it was made: as a SavedModel, as a TFLite model, as a
``GraphDef``. What it calls by name goes with it, as the definitions that the graph holds; but the
process that runs a graph takes those of its own table, TensorFlow's eager context. So the graph is
given a definition that runs anywhere, and the context another one of the same name, which may call
the compiled passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow  # noqa: ICN001 - its types are wrong: it becomes Any

from truenorm._kernels.contract import Tensor

tf: Any = tensorflow
Function = Callable[..., Any]
"""From tensors to a sequence of tensors."""


class Portable:
    """What TensorFlow asks of a function in a graph.

    Args:
        here: What runs in this process.
        elsewhere: The same in TensorFlow's operations.
        signature: Of their arguments.
    """

    children = ()

    def __init__(self, here: Function, elsewhere: Function, signature: Any) -> None:
        own, plain = (
            tf.function(f, input_signature=signature, autograph=False).get_concrete_function()
            for f in (here, elsewhere)
        )
        self._alive = own  # Its definition leaves the context with it.
        self._elsewhere = elsewhere
        self.graph, self.function_type = plain.graph, plain.function_type
        self.name = own.function_def.signature.name
        self.definition = self.cached_definition = plain.function_def
        self.definition.signature.name = self.name
        graph, library = tf.Graph(), tf.compat.v1.GraphDef()
        library.library.function.append(self.definition)
        with graph.as_default():
            tf.graph_util.import_graph_def(library, name="")
        self._c_func = graph._functions[self.name]._c_func

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Call it in the graph that is being made; its derivative is the caller's matter."""
        tf.compat.v1.get_default_graph()._add_function_recursive(self)
        wanted = self.graph.outputs
        kinds = [output.dtype for output in wanted]
        outputs = tf.raw_ops.PartitionedCall(args=tensors, Tout=kinds, f=self.name)
        for output, like in zip(outputs, wanted, strict=True):
            output.set_shape(like.shape)
        return outputs

    def python_grad_func(self, call: Any, *gradients: Tensor) -> list[Tensor | None]:
        """For what looks past the custom gradient of the caller."""
        inputs = [tensor for tensor in call.inputs if tensor.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = self._elsewhere(*call.inputs)
        found = iter(tape.gradient(outputs, inputs, output_gradients=gradients))
        return [next(found) if tensor.dtype.is_floating else None for tensor in call.inputs]


def portable(here: Function, elsewhere: Function, signature: Any) -> Function:
    """``here`` in this process, ``elsewhere`` in all that leaves it.

    Where another version of TensorFlow lacks a name that this needs, ``elsewhere``.
    """
    with tf.init_scope(), tf.device(None):  # Not a part of the graph that first asks for it.
        try:
            made = Portable(here, elsewhere, signature)
            tf.Graph()._add_function_recursive(made)
        except (AttributeError, KeyError, TypeError):
            return elsewhere
    return made
