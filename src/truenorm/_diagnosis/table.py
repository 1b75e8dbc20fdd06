"""The one table of rules. A code is never given to another rule; ``docs/findings/`` explains it."""

from __future__ import annotations

from truenorm._diagnosis import (
    tn1_batches,
    tn1_statistics,
    tn2_parameters,
    tn3_structure,
    tn4_modes,
    tn5_deployment,
)
from truenorm._diagnosis.rule import Rule

RULES: tuple[Rule, ...] = (
    # statistics
    Rule("TN101", "warning", "moving statistics never updated", tn1_statistics.never_updated),
    Rule(
        "TN102",
        "warning",
        "moving statistics still hold their initial values",
        tn1_statistics.warming_up,
        ("data",),
    ),
    Rule(
        "TN103",
        "warning",
        "moving statistics are not those of the data",
        tn1_statistics.not_of_the_data,
        ("data",),
    ),
    Rule(
        "TN104",
        "warning",
        "data of another domain than the statistics",
        tn1_statistics.other_domain,
        ("data", "graph"),
    ),
    Rule("TN105", "error", "moving statistics are no valid numbers", tn1_statistics.not_numbers),
    Rule("TN106", "warning", "moving statistics out of precision's reach", tn1_statistics.huge),
    Rule(
        "TN107",
        "warning",
        "moving statistics change though frozen or told not to",
        tn1_statistics.updated_while_frozen,
        ("modes",),
    ),
    Rule("TN108", "warning", "batches too small", tn1_batches.batch_too_small, ("batches",)),
    Rule(
        "TN109",
        "warning",
        "another input in inference than in training",
        tn1_batches.skew,
        ("data",),
    ),
    Rule(
        "TN110",
        "warning",
        "the model does otherwise in inference than in training mode",
        tn1_batches.otherwise_in_inference,
        ("data",),
    ),
    Rule("TN111", "warning", "batches are no random samples", tn1_batches.not_random, ("batches",)),
    # parameters
    Rule("TN201", "note", "dead channels: gamma near zero", tn2_parameters.dead_gamma),
    Rule("TN202", "warning", "dead channels: constant input", tn2_parameters.constant_input),
    Rule("TN203", "warning", "exploding scale", tn2_parameters.exploding_scale),
    Rule("TN204", "note", "weight decay on gamma or beta", tn2_parameters.weight_decay),
    Rule("TN205", "note", "gamma initialised to zero", tn2_parameters.zero_gamma),
    Rule("TN206", "note", "redundant bias before it", tn2_parameters.redundant_bias, ("graph",)),
    # structure
    Rule(
        "TN301", "note", "no BatchNormalization, as others have", tn3_structure.without, ("graph",)
    ),
    Rule(
        "TN302", "warning", "after dropout: variance shift", tn3_structure.after_dropout, ("graph",)
    ),
    Rule("TN303", "warning", "directly after another one", tn3_structure.twice, ("graph",)),
    Rule("TN304", "warning", "on the model's output", tn3_structure.on_output, ("graph",)),
    Rule("TN305", "error", "wrong axis for the data format", tn3_structure.wrong_axis, ("graph",)),
    Rule("TN306", "note", "shared: called more than once", tn3_structure.shared, ("graph",)),
    Rule(
        "TN307",
        "warning",
        "shared by inputs of unlike statistics",
        tn3_structure.shared_by_unlike,
        ("data",),
    ),
    Rule("TN308", "note", "gradient accumulation", tn3_structure.gradient_accumulation),
    Rule(
        "TN309", "note", "positions mixed in one model", tn3_structure.mixed_positions, ("graph",)
    ),
    # modes
    Rule(
        "TN401",
        "error",
        "never in training mode",
        tn4_modes.surprise("call_without_training", "def call(self, inputs, training=None)"),
        ("modes",),
    ),
    Rule(
        "TN402",
        "warning",
        "trainable changed after compile",
        tn4_modes.surprise(
            "changed_after_compile", "trainable as it was at compile, or tn.freeze, tn.unfreeze"
        ),
        ("modes",),
    ),
    Rule(
        "TN403",
        "note",
        "inside a frozen layer",
        tn4_modes.surprise("frozen_parent", tn4_modes.thaw_parent),
        ("modes",),
    ),
    Rule("TN404", "note", "frozen", tn4_modes.surprise("frozen", tn4_modes.unfreeze), ("modes",)),
    Rule(
        "TN405",
        "warning",
        "training=True written into the model",
        tn4_modes.surprise("baked_true", "layer(x) without training="),
        ("modes",),
    ),
    Rule(
        "TN406",
        "note",
        "training=False written into the model",
        tn4_modes.surprise("baked_false", tn4_modes.hold),
        ("modes",),
    ),
    Rule(
        "TN407",
        "warning",
        "a bare call trains",
        tn4_modes.surprise("bare_call_trains", "model(x, training=False)"),
        ("modes",),
    ),
    Rule(
        "TN408",
        "note",
        "held by a freeze policy",
        tn4_modes.surprise("policy", tn4_modes.unfreeze),
        ("modes",),
    ),
    Rule(
        "TN409",
        "note",
        "no gradient reaches gamma and beta",
        tn4_modes.surprise("no_gradient", "tn.inspect(model, x, y)"),
        ("modes",),
    ),
    # deployment
    Rule("TN501", "note", "cannot be folded", tn5_deployment.not_foldable, ("graph",)),
)
