"""The BatchNormalization layer: Keras's own by its names, with true statistics and fast kernels."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import keras

from truenorm import kernels
from truenorm._errors import DataError, OptionError

ops: Any = keras.ops

FreezePolicy = Literal["none", "all", "statistics", "affine"]


@keras.saving.register_keras_serializable(package="truenorm")
class BatchNormalization(keras.layers.BatchNormalization):
    r"""Normalise each channel of the input, then scale it by gamma and shift it by beta.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training (``training=True`` and ``trainable``) :math:`\mu` and :math:`\sigma^2` are the mean
    and the population variance of the batch, per channel, and the moving statistics take one step
    toward them; otherwise they are the moving statistics.

    Constructor, config, weights and files are those of ``keras.layers.BatchNormalization``, and
    ``isinstance`` holds, so that code which looks for stock layers finds this one. Where it is
    better: one pass less or a native kernel forward and backward; no cancellation where the mean is
    much larger than the standard deviation; a mask for any ``axis``; and no batch ruins the moving
    statistics: an empty or fully masked batch leaves them alone (and is normalised with them), a
    channel with NaN or infinity does not enter them, a batch of one value per channel has no
    variance to give. They are float32 at least, also under 16-bit dtype policies.

    With ``renorm`` or ``synchronized``, training mode is the stock layer's own code: a batch with
    NaN or infinity does ruin the moving statistics, and a mask needs the channel axis last and two
    channels or more.

    Args:
        axis: Index of the channel axis, a positive or negative integer.
        momentum: Weight of the old moving statistics in each step, from 0 to 1.
        epsilon: Added to the variance, 0 or more, in units of the input squared.
        center: Whether there is a ``beta``.
        scale: Whether there is a ``gamma``.
        beta_initializer: Initial value of ``beta``, shape ``(channels,)``, the variable dtype.
        gamma_initializer: Initial value of ``gamma``, as ``beta``.
        moving_mean_initializer: Initial value of ``moving_mean``, shape ``(channels,)``, float32
            at least, in the input's units.
        moving_variance_initializer: Initial value of ``moving_variance``, as ``moving_mean``, in
            units of the input squared.
        beta_regularizer: Optional regularizer of ``beta``.
        gamma_regularizer: Optional regularizer of ``gamma``.
        beta_constraint: Optional constraint of ``beta``.
        gamma_constraint: Optional constraint of ``gamma``.
        renorm: Batch renormalization, the stock layer's.
        renorm_clipping: Dict of ``rmin``, ``rmax``, ``dmax``; only with ``renorm``.
        renorm_momentum: Momentum of the renormalization's statistics; only with ``renorm``.
        synchronized: Statistics over all replicas, the stock layer's (TensorFlow only).
        freeze: What does not learn in training: ``"none"`` of it; ``"all"``, which is
            ``trainable=False``; ``"statistics"``: the moving statistics normalise and stay, gamma
            and beta learn; ``"affine"``: the batch's statistics normalise and move the moving ones,
            gamma and beta stay. See :attr:`freeze`.
        **kwargs: ``name``, ``dtype``, ``trainable``.

    Call arguments:
        inputs: Tensor of any numeric dtype, rank 2 or more.
        training: Whether the batch's statistics normalise (and move the moving statistics).
            ``fit`` passes True, ``evaluate`` and ``predict`` False; a bare call means False.
        mask: Optional booleans in the shape of ``inputs`` without the channel axis; where False,
            the value does not count in the batch's statistics.

    Returns:
        A tensor of the shape of ``inputs``, in the layer's compute dtype.

    Raises:
        OptionError: A constructor argument has an impossible value.
        DataError: The mask does not fit the input, or ``renorm`` or ``synchronized``.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import truenorm as tn
        >>> def rounded(tensor):
        ...     return keras.ops.convert_to_numpy(tensor).astype(float).round(1).tolist()
        >>> layer = tn.BatchNormalization(momentum=0.9)
        >>> batch = np.array([[1.0, 10.0], [3.0, 30.0]], dtype="float32")
        >>> rounded(layer(batch, training=True))
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> rounded(layer.moving_mean)
        [0.2, 2.0]
        >>> layer.trainable = False  # frozen: so it also runs in inference mode
        >>> rounded(layer(batch, training=True))
        [[0.8, 2.4], [2.8, 8.5]]

    Reference:
        S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167.

    Where frameworks differ:
        ``momentum`` is the weight of the *old* statistics here and in Keras (0.99), that of the
        *new* ones in PyTorch (0.1). ``epsilon`` is 1e-3 in Keras, 1e-5 in PyTorch.
        ``moving_variance`` holds the biased batch variance here and in Keras 3; PyTorch and
        TensorFlow's fused op store the unbiased one, larger by n / (n - 1). A frozen layer
        (``trainable=False``) runs in inference mode here and in Keras; in PyTorch
        ``requires_grad`` and ``eval()`` are independent.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float | None] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        freeze: FreezePolicy = "none",
        **kwargs: Any,
    ) -> None:
        self._check_policy(freeze)
        if not 0 <= momentum <= 1:
            raise OptionError(
                "The momentum of BatchNormalization is the weight of the old moving statistics",
                expected="a number from 0 to 1",
                received=repr(momentum),
            )
        if not epsilon >= 0:
            raise OptionError(
                "The epsilon of BatchNormalization is added to a variance",
                expected="a number of 0 or more",
                received=repr(epsilon),
            )
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            synchronized=synchronized,
            **kwargs,
        )
        self._policy: FreezePolicy = "none" if freeze == "all" else freeze
        if freeze == "all":
            self.trainable = False

    @property
    def freeze(self) -> FreezePolicy:
        """What does not learn in training; may be set at any time.

        ========== =============== ========================= =================
        policy     normalises with moving statistics updated gamma, beta learn
        ========== =============== ========================= =================
        none       batch           yes                       yes
        all        moving          no                        no
        statistics moving          no                        yes
        affine     batch           yes                       no
        ========== =============== ========================= =================

        ``"all"`` is ``trainable=False``, and setting another policy makes the layer trainable. Once
        ``trainable``, set by whomever, is True again, the policy of before holds again: no parent
        thaws what this layer was told to hold. A compiled model sees a change when it is compiled
        again.

        Example:
            >>> import truenorm as tn
            >>> layer = tn.BatchNormalization(freeze="statistics")
            >>> layer.trainable = False
            >>> layer.freeze
            'all'
            >>> layer.trainable = True
            >>> layer.freeze
            'statistics'
        """
        return self._policy if self.trainable else "all"

    @freeze.setter
    def freeze(self, policy: FreezePolicy) -> None:
        self._check_policy(policy)
        if policy != "all":
            self._policy = policy
        self._set_trainable(policy != "all")

    @property
    def trainable(self) -> bool:
        """As ``keras.layers.Layer.trainable``; True does not thaw gamma and beta under "affine"."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._set_trainable(value)

    def _set_trainable(self, value: bool) -> None:
        # Not by assignment: on TensorFlow that ends early where trainable is the value already.
        cast(Any, keras.layers.Layer.trainable).__set__(self, value)
        self._hold_affine()

    def _hold_affine(self) -> None:
        for weight in cast(Any, (self.gamma, self.beta)):
            if weight is not None and self._policy == "affine":
                weight.trainable = False

    @staticmethod
    def _check_policy(policy: Any) -> None:
        if policy not in get_args(FreezePolicy):
            raise OptionError(
                "There is no such freeze policy of BatchNormalization",
                where="freeze",
                expected="one of " + ", ".join(map(repr, get_args(FreezePolicy))),
                received=repr(policy),
            )

    def build(self, input_shape: Any) -> None:
        """As the stock layer's."""
        super().build(input_shape)
        self._hold_affine()  # Only now: Keras orders weights by what they are when made.

    def get_config(self) -> dict[str, Any]:
        """The stock layer's config, and of the options beyond it those that are used."""
        config = super().get_config()
        return config if self._policy == "none" else {**config, "freeze": self._policy}

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """As ``keras.layers.Layer.add_weight``; statistics are float32 at least.

        A 16-bit moving average gets stuck as soon as a step is below half its last digit.
        """
        dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or self.variable_dtype)
        if not kwargs.get("trainable", True) and keras.backend.is_float_dtype(dtype):
            kwargs["dtype"] = kernels.statistics_dtype(dtype)
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise with the batch's or the moving statistics; see the class."""
        self._check_mask(inputs, mask)
        if training and self.trainable and self._policy != "statistics":
            return self._normalize_batch(inputs, mask)
        # Stock operations, so that converters recognise an inference graph. (No mask: it decides
        # nothing here.)
        return super().call(inputs, training=False)

    def _normalize_batch(self, inputs: Any, mask: Any) -> Any:
        """Training mode: called exactly when the batch's own statistics normalise."""
        if self.renorm or self.synchronized:
            self._check_stock_mask(inputs, mask)
            return super().call(inputs, training=True, mask=mask)
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(inputs.dtype)):
            inputs = ops.cast(inputs, kernels.statistics_dtype(inputs.dtype))
        moving_mean, moving_variance = cast(Any, (self.moving_mean, self.moving_variance))
        result = kernels.normalize(
            inputs,
            None if self.gamma is None else self.gamma.value,
            None if self.beta is None else self.beta.value,
            axis=self.axis,
            epsilon=self.epsilon,
            mask=mask,
            fallback=(moving_mean.value, moving_variance.value),
        )
        self._update_moving(result)
        return ops.cast(result.output, self.compute_dtype)

    def _update_moving(self, batch: kernels.Normalized) -> None:
        """One step of the moving averages, where the batch has something to say."""
        known = ops.isfinite(batch.mean) & ops.isfinite(batch.variance)
        steps = (
            (self.moving_mean, batch.mean, known & (batch.count > 0)),
            (self.moving_variance, batch.variance, known & (batch.count > 1)),
        )
        for variable, value, counts in cast(Any, steps):
            old = variable.value
            value = ops.cast(value, variable.dtype)
            new = old * self.momentum + value * (1.0 - self.momentum)
            variable.assign(ops.where(counts, new, old))

    def _check_mask(self, inputs: Any, mask: Any) -> None:
        if mask is None:
            return
        shape = cast(list[int | None], list(inputs.shape))
        channel = self.axis % len(shape)
        expected = shape[:channel] + shape[channel + 1 :]
        received = list(mask.shape)
        fits = len(received) == len(expected) and all(
            have in (want, 1, None) or want is None
            for have, want in zip(received, expected, strict=True)
        )
        if not fits:
            raise DataError(
                "The mask does not fit the input of BatchNormalization",
                where=self.path,
                expected=f"shape {tuple(expected)}, that of the input without axis {self.axis}",
                received=f"shape {tuple(received)} for an input of shape {tuple(shape)}",
            )

    def _check_stock_mask(self, inputs: Any, mask: Any) -> None:
        """The stock layer's code takes the last axis of a masked input for several channels."""
        shape = tuple(inputs.shape)
        channel = self.axis % len(shape)
        if mask is not None and (channel != len(shape) - 1 or shape[channel] == 1):
            raise DataError(
                "With renorm or synchronized this BatchNormalization cannot take this mask",
                where=self.path,
                expected="the channel axis last, with two channels or more, or no mask",
                received=f"channel axis {channel} of an input of shape {shape}",
                remedy="use neither option, or move the channels to the end before the layer",
            )
