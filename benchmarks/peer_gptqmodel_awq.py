"""One AWQ run of gptqmodel on given token ids: ``SOURCE OUT IDS.npy GROUP_SIZE``."""

from __future__ import annotations

import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig


def main() -> None:
    source, out, ids, group_size = sys.argv[1:]
    config = QuantizeConfig(
        bits=4, group_size=int(group_size), sym=False, quant_method=METHOD.AWQ, format=FORMAT.GEMM,
        device="cpu", offload_to_disk=False,
    )  # fmt: skip
    model = GPTQModel.load(source, config, dtype=torch.bfloat16)  # it refuses float32
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(ids)]
    model.quantize(rows, batch_size=8, backend=BACKEND.AWQ_TORCH)
    model.save(out)


if __name__ == "__main__":
    main()
