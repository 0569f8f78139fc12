"""One run of gptqmodel on given token ids: ``SOURCE OUT IDS.npy BITS GROUP_SIZE DESC_ACT DAMP``."""

from __future__ import annotations

import sys

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    source, out, ids, bits, group_size, desc_act, damp = sys.argv[1:]
    ordered = desc_act == "True"
    extra = {"act_group_aware": False} if ordered or group_size == "-1" else {}
    config = QuantizeConfig(
        bits=int(bits), group_size=int(group_size), desc_act=ordered, damp_percent=float(damp), sym=True,
        device="cpu", offload_to_disk=False, **extra,
    )  # fmt: skip
    # the dtype in which it is fastest here: without bfloat16 instructions its default is many times slower
    model = GPTQModel.load(source, config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(ids)]
    model.quantize(rows, batch_size=8)
    model.save(out)


if __name__ == "__main__":
    main()
