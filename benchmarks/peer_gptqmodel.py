"""One run of gptqmodel on given token ids: ``SOURCE OUT IDS.npy BITS GROUP_SIZE DESC_ACT DAMP [DEVICE]``."""

from __future__ import annotations

import sys

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    source, out, ids, bits, group_size, desc_act, damp, *rest = sys.argv[1:]
    device = rest[0] if rest else "cpu"
    ordered = desc_act == "True"
    extra = {"act_group_aware": False} if ordered or group_size == "-1" else {}
    config = QuantizeConfig(
        bits=int(bits), group_size=int(group_size), desc_act=ordered, damp_percent=float(damp), sym=True,
        device=device, offload_to_disk=False, **extra,
    )  # fmt: skip
    # the dtype in which it is fastest: without bfloat16 instructions its default is many times slower on a CPU
    model = GPTQModel.load(source, config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(ids)]
    model.quantize(rows, batch_size=8)
    model.save(out)


if __name__ == "__main__":
    main()
