"""The BatchNormalization layer: a drop-in replacement for Keras's, right and fast."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import keras

from truenorm import _kernels as kernels
from truenorm._checks import check_integer
from truenorm._keras_internals import keras_mask
from truenorm._kernels import Normalized, Options, Tensor, Vector, replicas
from truenorm._kernels.masks import aligned
from truenorm._layer import domains as by_domain
from truenorm._layer.accumulation import ROWS, Accumulation
from truenorm._layer.arguments import (
    FreezePolicy,
    activation_of,
    check_added,
    check_average,
    check_axis,
    check_domains,
    check_ghosts,
    check_identifiers,
    check_names,
    check_policy,
    check_renorm,
    check_samples,
    synchronized_of,
)
from truenorm._layer.lean_call import LeanCall
from truenorm._layer.moving_average import MovingStatistics
from truenorm._layer.recomputation import is_repeated, repeatable
from truenorm._layer.renorm import Renorm

ops: Any = keras.ops
KERAS_TRAINABLE: Any = keras.layers.Layer.trainable
DEFAULTS: dict[str, Any] = {
    "virtual_batch_size": None,
    "bessel_correction": False,
    "accumulation_steps": 1,
    "domains": None,
    "domain_affine": False,
}
"""Options that Keras's layer does not have, as they are where they are not used."""


@keras.saving.register_keras_serializable(package="truenorm")
class BatchNormalization(LeanCall, keras.layers.BatchNormalization):
    r"""Normalise each channel of the input, then scale it by gamma and shift it by beta.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    or, with an ``activation`` :math:`\phi` and a tensor :math:`r` to ``add``, as behind the branch
    of a residual block, :math:`\phi(y + r)`.

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

    Options that the stock layer does not have are off by default, and in the config only where they
    are used: ``momentum=None``, ``freeze``, ``virtual_batch_size``, ``bessel_correction``,
    ``activation``, ``accumulation_steps`` and ``domains``; ``synchronized`` works on every backend.

    Args:
        axis: Index of the channel axis, a positive or negative integer.
        momentum: Weight of the old moving statistics in each step, from 0 to 1. None: they are the
            mean over all batches so far, with unbiased variances. How many these are is kept in a
            further weight, ``batches_seen``, of shape ``(2, channels)``: those that gave a mean,
            those that gave a variance.
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
        renorm: Batch renormalization: in training the batch's statistics are corrected toward
            moving ones.
        renorm_clipping: Dict of ``rmin``, ``rmax``, ``dmax``; only with ``renorm``.
        renorm_momentum: Momentum of the renormalization's statistics; only with ``renorm``.
        synchronized: Whether a batch is that of all replicas together: of a ``tf.distribute``
            strategy, of the processes of ``torch.distributed``, of the devices of ``jax.pmap`` and
            ``jax.shard_map``; under ``jax.jit`` and ``keras.distribution`` it is in any case. Each
            replica counts by its number of values. Nothing in a run that is not distributed. Names
            of axes, one or several, in the place of True: on JAX, over the devices of these alone.
        freeze: What does not learn in training: ``"none"`` of it; ``"all"``, which is
            ``trainable=False``; ``"statistics"``: the moving statistics normalise and stay, gamma
            and beta learn; ``"affine"``: the batch's statistics normalise and move the moving ones,
            gamma and beta stay. See :attr:`freeze`.
        virtual_batch_size: Number of samples of a ghost batch, or None. In training each ghost
            batch is normalised with its own statistics; the moving ones take one step toward their
            average. See :mod:`truenorm._kernels.ghosts`.
        bessel_correction: Whether the moving variance is of unbiased batch variances, times
            n / (n - 1), as PyTorch's is.
        activation: Function that follows, by name or itself; ReLU is part of the same pass where
            the backend can.
        accumulation_steps: Number of calls in training whose batches move the moving statistics
            once, as one batch of all their values would. What is gathered is kept in a further
            weight, ``gathered``, of shape ``(5, channels)``. See :meth:`end_accumulation`.
        domains: Number of domains, or None. Each has moving statistics of its own: all such
            weights have a row for each. See :func:`truenorm.domain`.
        domain_affine: Whether each domain has gamma and beta of its own, too; only with
            ``domains``.
        **kwargs: ``name``, ``dtype``, ``trainable``.

    Call arguments:
        inputs: Tensor of any numeric dtype, rank 2 or more.
        training: Whether the batch's statistics normalise (and move the moving statistics).
            ``fit`` passes True, ``evaluate`` and ``predict`` False; a bare call means False.
        mask: Optional booleans; where False, the value does not count in the batch's statistics.
            As all masks of Keras it has the shape of ``inputs`` without the last axis, whatever
            ``axis`` is: with ``axis=1``, a mask (N, C) of inputs (N, C, T) excludes values per
            sample and channel. A mask that does not fit so may have the shape of ``inputs``
            without the channel axis. Axes of size 1 stretch. In inference mode it decides nothing.
        domain: With ``domains``: of all samples, an integer, or of each, integers of shape
            ``(samples,)``; None: that of :func:`truenorm.domain`, or else 0. Samples of one domain
            are normalised with the moments of those samples in the batch.
        add: Tensor of the shape of ``inputs`` that is added to what is normalised, before the
            activation; part of the same pass where the backend can.

    Returns:
        A tensor of the shape of ``inputs``, in the layer's compute dtype.

    Raises:
        OptionError: A constructor argument has an impossible value, or does not go with another.
        DataError: The mask, or what is to be added, does not fit the input.
        DistributedError: With ``synchronized`` on PyTorch: another process does not take part.
            On JAX: the devices are divided in several ways, and which counts was not said.

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
        On JAX the closed-form backward excludes forward mode (``jax.jvp``) in training: call the
        layer with a mask, one that is true everywhere will do, where that is needed.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float | None = 0.99,
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
        synchronized: bool | str | Sequence[str] = False,
        freeze: FreezePolicy = "none",
        virtual_batch_size: int | None = None,
        bessel_correction: bool = False,
        activation: Any = None,
        accumulation_steps: int = 1,
        domains: int | None = None,
        domain_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        check_names(kwargs, inspect.signature(BatchNormalization.__init__).parameters)
        check_identifiers(
            axis,
            {
                "beta_initializer": beta_initializer,
                "gamma_initializer": gamma_initializer,
                "moving_mean_initializer": moving_mean_initializer,
                "moving_variance_initializer": moving_variance_initializer,
            },
            {"beta_regularizer": beta_regularizer, "gamma_regularizer": gamma_regularizer},
            {"beta_constraint": beta_constraint, "gamma_constraint": gamma_constraint},
        )
        check_average(momentum, epsilon)
        check_renorm(renorm, renorm_clipping)
        check_ghosts(virtual_batch_size, {"renorm": renorm, "synchronized": synchronized})
        check_policy(freeze)
        check_domains(domains, domain_affine)
        super().__init__(
            axis=axis,
            momentum=0.0 if momentum is None else momentum,
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
            **kwargs,
        )
        if momentum is None:
            self.momentum = None
        self.synchronized = synchronized_of(synchronized)  # Keras's takes it on TensorFlow only.
        self.virtual_batch_size = virtual_batch_size
        self.bessel_correction = bessel_correction
        self.activation = activation_of(activation)
        self.accumulation_steps = check_integer("accumulation_steps", accumulation_steps)
        self.domains = domains
        self.domain_affine = domain_affine
        if domains is not None:
            by_domain.prepare()
        self.batches_seen: Any = None
        self.gathered: Any = None
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
        again, or at once if :func:`truenorm.freeze` made it.

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
        check_policy(policy)
        if policy != "all":
            self._policy = policy
        self._set_trainable(policy != "all")

    @property
    def trainable(self) -> bool:
        """As ``keras.layers.Layer.trainable``; True does not thaw gamma and beta under "affine"."""
        return bool(KERAS_TRAINABLE.fget(self))  # a super().trainable would break Dynamo's graph

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._set_trainable(value)

    def _set_trainable(self, value: bool) -> None:
        # Not by assignment: on TensorFlow that ends early where trainable is the value already.
        KERAS_TRAINABLE.fset(self, value)
        self._hold_affine()

    def _hold_affine(self) -> None:
        for weight in cast(Any, (self.gamma, self.beta)):
            if weight is not None and self._policy == "affine":
                weight.trainable = False

    def build(self, input_shape: Any) -> None:
        """As the stock layer's; its weights come first."""
        check_axis(self.axis, len(input_shape), self.path)
        check_samples(self, input_shape)
        super().build(input_shape)
        channels = input_shape[self.axis]
        if self.momentum is None:
            self.batches_seen = self._add_counts("batches_seen", (2, channels))
        if self.accumulation_steps > 1:
            self.gathered = self._add_counts("gathered", (len(ROWS), channels))
        self._hold_affine()  # Only now: Keras orders weights by what they are when made.

    def get_config(self) -> dict[str, Any]:
        """The stock layer's config, and of the options beyond it those that are used."""
        config = super().get_config()
        if self._policy != "none":
            config["freeze"] = self._policy
        if self.activation is not None:
            config["activation"] = keras.activations.serialize(self.activation)
        used = {name: getattr(self, name) for name in DEFAULTS}
        return config | {name: used[name] for name in used if used[name] != DEFAULTS[name]}

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """As ``keras.layers.Layer.add_weight``; statistics are float32 at least.

        A 16-bit moving average gets stuck as soon as a step is below half its last digit.
        """
        dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or self.variable_dtype)
        if not kwargs.get("trainable", True) and keras.backend.is_float_dtype(dtype):
            kwargs["dtype"] = kernels.statistics_dtype(dtype)
        if self.domains is not None and by_domain.has_rows(self, kwargs.get("name")):
            kwargs["shape"] = (self.domains, *kwargs["shape"])
        return super().add_weight(*args, **kwargs)

    def _add_counts(self, name: str, shape: tuple[int, int]) -> Any:
        return self.add_weight(
            shape=shape, name=name, initializer="zeros", trainable=False, autocast=False
        )

    @property
    def variables(self) -> list[Any]:
        """As ``keras.layers.Layer.variables``; on JAX also the domain, if there are several."""
        return [*super().variables, *by_domain.state(self)]

    def call(
        self,
        inputs: Tensor,
        training: bool | None = None,
        mask: Tensor | None = None,
        domain: Any = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """Normalise with the batch's or the moving statistics; see the class."""
        normalize = self._normalize_moving
        several = domain is not None or add is not None
        if training and self.trainable and self._policy != "statistics":
            normalize = self._normalize_batch
            if mask is None and several:
                mask = keras_mask(inputs)  # Keras hands it on to layers of one input.
            mask = None if mask is None else aligned(mask, inputs, self.axis, where=self.path)
        if add is not None:
            check_added(add, inputs, self.path)
            normalize = partial(normalize, add=add)
        if self.domains is None and domain is None:
            return normalize(inputs, mask, self)
        return by_domain.apart(self, inputs, mask, domain, normalize)

    def _normalize_moving(
        self, inputs: Tensor, mask: Tensor | None, weights: Any, add: Tensor | None = None
    ) -> Tensor:
        """Inference mode; a mask decides nothing here."""
        del mask
        values = self._values(weights)
        if kernels.infer is not None and (add is None or add.dtype == inputs.dtype):
            rectifies = self.activation is keras.activations.relu
            options = Options(self.axis, self.epsilon, relu=rectifies, add=add)
            output = kernels.infer(inputs, *values, options)
            if output is not None:
                output = ops.cast(output, self.compute_dtype)
                return output if rectifies else self._finished(output, None)
        if weights is not self:
            output = by_domain.infer(inputs, *values, axis=self.axis, epsilon=self.epsilon)
        else:
            # Stock operations, so that converters recognise an inference graph.
            output = super().call(inputs, training=False)
        return self._finished(ops.cast(output, self.compute_dtype), add)

    def _normalize_batch(
        self, inputs: Tensor, mask: Tensor | None, weights: Any, add: Tensor | None = None
    ) -> Tensor:
        """Training mode: called exactly when the batch's own statistics normalise."""
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if not keras.backend.is_float_dtype(dtype):
            dtype = kernels.statistics_dtype(dtype)
            inputs = ops.cast(inputs, dtype)
        kernel = self._kernel()
        adds = kernel is kernels.normalize
        rectifies = self.activation is keras.activations.relu and (adds or add is None)
        gamma, beta, mean, variance = self._values(weights)
        if kernels.brought is not None:
            inputs, mask = kernels.brought(inputs, mask, mean)
            add = None if add is None else kernels.brought(add, None, mean)[0]
        repeated = is_repeated()
        apart = self.renorm or repeated or self.gathered is not None or weights is not self
        momentum = None if apart else self.momentum
        domain = None if weights is self else weights.index
        options = Options(
            axis=self.axis,
            epsilon=self.epsilon,
            mask=mask,
            moving=kernels.Moving(mean, variance, momentum, self.bessel_correction, domain),
            relu=rectifies,
            add=ops.cast(add, dtype) if adds and add is not None else None,
            correct=self._renorm(weights).correct if self.renorm else None,
        )
        batch = kernel(inputs, gamma, beta, options)
        if batch.moved != () and not repeated:
            self._step(batch, weights)
        same = dtype == self.compute_dtype
        output = batch.output if same else ops.cast(batch.output, self.compute_dtype)
        return output if rectifies else self._finished(output, None if adds else add)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``keras.layers.Layer.rematerialized_call``; the statistics move once."""
        above = super().rematerialized_call
        return repeatable(layer_call, lambda pure: above(pure, *args, **kwargs))

    def end_accumulation(self) -> None:
        """Let the moving statistics take the step now, with what was gathered since the last one.

        An accumulation that has begun otherwise goes on, over the end of an epoch and in a saved
        model, as that of Keras's optimizers does. Nothing where none has begun.
        """
        if self.gathered is not None:
            replicas.each(self.gathered, self._end_accumulation)

    def _end_accumulation(self) -> None:
        for weights in by_domain.all_weights(self):
            self._moving_statistics(weights).step(self._accumulation(weights).end())

    def _step(self, batch: Normalized, weights: Any) -> None:
        if self.gathered is not None:
            batch = self._accumulation(weights).add(batch)
        self._moving_statistics(weights).step(batch)

    def _accumulation(self, weights: Any) -> Accumulation:
        ghosts = self.virtual_batch_size is not None
        return Accumulation(weights.gathered, self.accumulation_steps, ghosts)

    @staticmethod
    def _values(weights: Any) -> list[Vector | None]:
        """Gamma, beta, moving mean and moving variance as tensors."""
        those = (weights.gamma, weights.beta, weights.moving_mean, weights.moving_variance)
        return [None if weight is None else weight.value for weight in those]

    def _moving_statistics(self, weights: Any) -> MovingStatistics:
        return MovingStatistics(
            weights.moving_mean,
            weights.moving_variance,
            self.momentum,
            self.bessel_correction,
            seen=weights.batches_seen,
            renorm=self._renorm(weights) if self.renorm else None,
        )

    def _renorm(self, weights: Any) -> Renorm:
        return Renorm(
            *(weights.renorm_mean, weights.renorm_stddev, weights.moving_stddev),
            *(self.renorm_momentum, self.renorm_clipping or {}, self.epsilon),
        )

    def _kernel(self) -> kernels.Kernel:
        if self.virtual_batch_size is not None:
            return partial(kernels.normalize_ghosts, size=self.virtual_batch_size)
        if isinstance(self.synchronized, bool):
            return kernels.normalize_synchronized if self.synchronized else kernels.normalize
        return partial(kernels.normalize_synchronized, over=self.synchronized)

    def _finished(self, output: Tensor, add: Tensor | None) -> Tensor:
        """What comes behind the normalisation."""
        if add is not None:
            if kernels.brought is not None:
                add, _ = kernels.brought(add, None, output)
            output = output + ops.cast(add, output.dtype)
        return output if self.activation is None else self.activation(output)
