"""What happens when a computation runs, told to Python: that it runs at all, and its numbers.

Python sees a layer's call when it is *traced*: on JAX inside ``jax.jit``, loops and conditionals,
on TensorFlow inside ``tf.function``, on PyTorch inside ``torch.vmap``. How often it then runs, and
on which numbers, is another matter.

* ``when_run(receive, tensor)``: have ``receive()`` called each time that the tensor is computed.
* ``tell(receive, tensors)``: have ``receive`` called with the numbers of these tensors (a dict of
  NumPy arrays; None stays None) each time that they are computed. False: here this cannot be.
* ``settle()``: wait until everything told has been received.
* ``place()``: where the framework is tracing just now, to compare for equality. A value that was
  made in one place is none in another. None where that cannot happen.
* ``is_now()``: whether Python runs each time that the computation does; no where it is not known.
* ``is_value(tensor)``: whether this has numbers, outside of any tracing.
* ``numbers(tensor)``: its numbers as an array of NumPy, where they are at hand without waiting for
  another device; None elsewhere, as while a program is traced.
* ``constants()``: inside, operations on numbers that are known give numbers, also while tracing.
* ``full_precision()``: inside, products of float32 are computed in float32. A GPU takes
  TensorFloat-32 for them by default, of which 10 bits behind the point count.
* ``repeats()``: whether a forward pass runs once more for the sake of the backward one, as far as
  the framework lets anybody know.

Inside a graph of TensorFlow ``when_run`` counts when the call is traced.

Only the files named after a framework import one, and only that of the backend in use is loaded.
"""

from __future__ import annotations

import keras

if keras.config.backend() == "jax":
    from truenorm._kernels.jax.run_time import (
        constants,
        full_precision,
        is_now,
        is_value,
        numbers,
        place,
        repeats,
        settle,
        tell,
        when_run,
    )
elif keras.config.backend() == "tensorflow":
    from truenorm._kernels.tensorflow.run_time import (
        constants,
        full_precision,
        is_now,
        is_value,
        numbers,
        place,
        repeats,
        settle,
        tell,
        when_run,
    )
else:
    from truenorm._kernels.torch.run_time import (
        constants,
        full_precision,
        is_now,
        is_value,
        numbers,
        place,
        repeats,
        settle,
        tell,
        when_run,
    )

__all__ = [
    "constants",
    "full_precision",
    "is_now",
    "is_value",
    "numbers",
    "place",
    "repeats",
    "settle",
    "tell",
    "when_run",
]
