"""What Keras does around each call of a layer, without two things that come to nothing.

On small batches Keras's ``Layer.__call__`` takes longer than the layer itself on PyTorch. A fifth
of the time of a small forward pass was these two.
"""

from __future__ import annotations

from typing import Any

import keras

from truenorm._keras_internals import hand_on_arguments, keras_mask, set_keras_mask

ops: Any = keras.ops
tree: Any = keras.tree


_FLAGS = ("_called", "built")


class LeanCall(keras.layers.Layer):
    """A layer whose ``__call__`` does what Keras's does, in less time.

    As soon as there is an argument by name, as ``training`` is, Keras walks through the structure
    of all of them and converts each. One tensor of the dtype that is wanted, and flags, come out
    as they went in; only of other arguments is that done here. And at each call it sets two flags
    that are set already, which has it look each time whether they are to be tracked.
    """

    _lean = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        hand_on_arguments(self)
        self._lean = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``keras.layers.Layer.__call__``."""
        if self._lean and not self._is_plain(args, kwargs):
            args, kwargs = (tree.map_structure(self._converted, given) for given in (args, kwargs))
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``keras.layers.Layer.__setattr__``."""
        if name not in _FLAGS or value is not True or vars(self).get(name) is not True:
            super().__setattr__(name, value)

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this is one tensor of the right dtype, and flags."""
        for value in kwargs.values():
            if value is not None and value is not True and value is not False:
                return False
        return (
            len(args) == 1
            and ops.is_tensor(args[0])
            and keras.backend.standardize_dtype(args[0].dtype) == self.input_dtype
        )

    def _converted(self, value: Any) -> Any:
        """As a tensor, floats in the dtype of the computation, with the mask that was on it."""
        tensor = self.dtype_policy.convert_input(value, self.autocast, self.input_dtype)
        mask = None if tensor is value else keras_mask(value)
        if mask is not None:
            set_keras_mask(tensor, mask)
        return tensor
