"""The one table of rules. A code is never given to another rule; ``docs/findings/`` explains it."""

from __future__ import annotations

from truenorm._diagnosis import batches, deployment, modes, parameters, statistics, structure
from truenorm._diagnosis.rule import Rule

RULES: tuple[Rule, ...] = (
    # statistics
    Rule("TN101", "warning", "moving statistics never updated", statistics.never_updated),
    Rule(
        "TN102",
        "warning",
        "moving statistics still hold their initial values",
        statistics.warming_up,
        ("data",),
    ),
    Rule(
        "TN103",
        "warning",
        "moving statistics are not those of the data",
        statistics.not_of_the_data,
        ("data",),
    ),
    Rule(
        "TN104",
        "warning",
        "data of another domain than the statistics",
        statistics.other_domain,
        ("data", "graph"),
    ),
    Rule("TN105", "error", "moving statistics are no valid numbers", statistics.not_numbers),
    Rule("TN106", "warning", "moving statistics out of precision's reach", statistics.huge),
    Rule(
        "TN107",
        "warning",
        "moving statistics change though frozen or told not to",
        statistics.updated_while_frozen,
        ("modes",),
    ),
    Rule("TN108", "warning", "batches too small", batches.batch_too_small, ("batches",)),
    Rule(
        "TN109",
        "warning",
        "another input in inference than in training",
        batches.skew,
        ("data",),
    ),
    Rule(
        "TN110",
        "warning",
        "the model does otherwise in inference than in training mode",
        batches.otherwise_in_inference,
        ("data",),
    ),
    Rule("TN111", "warning", "batches are no random samples", batches.not_random, ("batches",)),
    # parameters
    Rule("TN201", "note", "dead channels: gamma near zero", parameters.dead_gamma),
    Rule("TN202", "warning", "dead channels: constant input", parameters.constant_input),
    Rule("TN203", "warning", "exploding scale", parameters.exploding_scale),
    Rule("TN204", "note", "weight decay on gamma or beta", parameters.weight_decay),
    Rule("TN205", "note", "gamma initialised to zero", parameters.zero_gamma),
    Rule("TN206", "note", "redundant bias before it", parameters.redundant_bias, ("graph",)),
    # structure
    Rule("TN301", "note", "no BatchNormalization, as others have", structure.without, ("graph",)),
    Rule("TN302", "warning", "after dropout: variance shift", structure.after_dropout, ("graph",)),
    Rule("TN303", "warning", "directly after another one", structure.twice, ("graph",)),
    Rule("TN304", "warning", "on the model's output", structure.on_output, ("graph",)),
    Rule("TN305", "error", "wrong axis for the data format", structure.wrong_axis, ("graph",)),
    Rule("TN306", "note", "shared: called more than once", structure.shared, ("graph",)),
    Rule(
        "TN307",
        "warning",
        "shared by inputs of unlike statistics",
        structure.shared_by_unlike,
        ("data",),
    ),
    Rule("TN308", "note", "gradient accumulation", structure.gradient_accumulation),
    Rule("TN309", "note", "positions mixed in one model", structure.mixed_positions, ("graph",)),
    # modes
    Rule(
        "TN401",
        "error",
        "never in training mode",
        modes.surprise("call_without_training", "def call(self, inputs, training=None)"),
        ("modes",),
    ),
    Rule(
        "TN402",
        "warning",
        "trainable changed after compile",
        modes.surprise(
            "changed_after_compile", "trainable as it was at compile, or tn.freeze, tn.unfreeze"
        ),
        ("modes",),
    ),
    Rule(
        "TN403",
        "note",
        "inside a frozen layer",
        modes.surprise("frozen_parent", modes.thaw_parent),
        ("modes",),
    ),
    Rule("TN404", "note", "frozen", modes.surprise("frozen", modes.unfreeze), ("modes",)),
    Rule(
        "TN405",
        "warning",
        "training=True written into the model",
        modes.surprise("baked_true", "layer(x) without training="),
        ("modes",),
    ),
    Rule(
        "TN406",
        "note",
        "training=False written into the model",
        modes.surprise("baked_false", modes.hold),
        ("modes",),
    ),
    Rule(
        "TN407",
        "warning",
        "a bare call trains",
        modes.surprise("bare_call_trains", "model(x, training=False)"),
        ("modes",),
    ),
    Rule(
        "TN408",
        "note",
        "held by a freeze policy",
        modes.surprise("policy", modes.unfreeze),
        ("modes",),
    ),
    Rule(
        "TN409",
        "note",
        "no gradient reaches gamma and beta",
        modes.surprise("no_gradient", "tn.inspect(model, x, y)"),
        ("modes",),
    ),
    # deployment
    Rule("TN501", "note", "cannot be folded", deployment.not_foldable, ("graph",)),
)
