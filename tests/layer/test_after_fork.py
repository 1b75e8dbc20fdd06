"""Loaders that fork their workers after the layer, and its threads, have been used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

CODE = """
import warnings
warnings.simplefilter("ignore")  # JAX's about os.fork
import keras
import numpy as np
import truenorm as tn

class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=(64, 200)).astype("float32")
        return x, x.sum(1, keepdims=True)

if __name__ == "__main__":
    x = np.random.default_rng(9).normal(size=(4000, 200)).astype("float32")
    model = keras.Sequential([keras.Input((200,)), tn.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(x, x.sum(1, keepdims=True), batch_size=2000, verbose=0)
    model.fit(Batches(workers=2, use_multiprocessing=True), epochs=2, verbose=0)
    if keras.config.backend() == "torch":
        import torch
        pair = torch.tensor(x), torch.tensor(x.sum(1, keepdims=True))
        data = torch.utils.data.TensorDataset(*pair)
        loader = torch.utils.data.DataLoader(data, batch_size=500, num_workers=2)
        model.fit(loader, epochs=2, verbose=0)
    print("done")
"""


@pytest.mark.long
def test_loaders_with_workers_run_after_the_layer_was_used(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(CODE)
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "KERAS_BACKEND": keras.config.backend(), "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.endswith("done\n"), done.stderr[-2000:]
