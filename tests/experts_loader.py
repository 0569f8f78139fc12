"""``experts_loader.py IDS.npy OUT FOLDER...``: gptqmodel's own loader on branches, in a process of its own.

It replaces modules of transformers when it loads a mixture, for the whole process. OUT/N.npy are folder N's logits,
[length, vocabulary]; stdout is the number of packed linears of each, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from gptqmodel import GPTQModel

if __name__ == "__main__":
    ids, out, *folders = sys.argv[1:]
    window = torch.from_numpy(np.load(ids))
    packed = []
    with torch._dynamo.config.patch(disable=True), torch.no_grad():
        for number, folder in enumerate(folders):
            loaded = GPTQModel.load(folder, device="cpu").model
            packed.append(sum(name.endswith("qweight") for name, _ in loaded.named_buffers()))
            np.save(Path(out) / f"{number}.npy", loaded(window).logits[0].float().numpy())
    print(json.dumps(packed))
