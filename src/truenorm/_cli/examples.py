"""An example for the help of each command; a test runs them, from top to bottom, as they stand."""

from __future__ import annotations

EXAMPLES = {
    "inspect": "truenorm inspect model.keras --static",
    "diagnose": "truenorm diagnose model.keras --data train.npz --loss mse",
    "place": "truenorm place model.keras after_activation --out after.keras",
    "fold": "truenorm fold model.keras --out deploy.keras",
    "replace": "truenorm replace model.keras --to truenorm --out ours.keras",
    "recalibrate": "truenorm recalibrate model.keras --data train.npz --out model.keras --force",
    "study run": "truenorm study mlp:8 --data wine --epochs 1 --seeds 2 --runner here --out wine",
    "study show": "truenorm study show wine --report wine.html",
    "study merge": "truenorm study merge wine wine-of-another-machine",
    "demo": "truenorm demo --data breast_cancer --seeds 1",
}


def example(command: str) -> str:
    """The last line of a command's help."""
    return f"Example: {EXAMPLES[command]}"
