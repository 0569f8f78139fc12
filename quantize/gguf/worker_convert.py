"""In a child: llama.cpp's converter on one model. Runs with llama.cpp's own tree first in ``sys.path``.

Keys of the arguments: ``model`` (a folder), ``out`` (a file), ``outtype``, ``name``, ``metadata`` (a JSON file of what
the file says of authorship), ``mode``, ``full`` or ``header``. ``header`` writes everything but tensor data: the file
ends where the data would, as one large hole, which is enough to ask llama.cpp for types and sizes. Answers which GGUF
tensors each tensor of the checkpoint became, and of a header its bytes and keys.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any


def run(arguments: dict[str, str]) -> dict[str, Any]:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    kinds = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    with torch.inference_mode():
        folder = Path(arguments["model"])
        hparams = ModelBase.load_hparams(folder, False)
        architecture = get_model_architecture(hparams, ModelType.TEXT)
        try:
            converter_class = get_model_class(architecture, mmproj=False)
        except NotImplementedError:
            raise RuntimeError(f"Model {architecture} is not supported") from None
        converter = converter_class(
            folder, kinds[arguments["outtype"]], Path(arguments["out"]),
            model_name=arguments["name"], metadata_override=Path(arguments["metadata"]),
        )  # fmt: skip
        became: dict[str, list[str]] = {}
        modify = converter.modify_tensors

        def noted(data: Any, name: str, bid: int | None) -> Any:
            for new_name, tensor in modify(data, name, bid):
                became.setdefault(name, []).append(new_name)
                yield new_name, tensor

        converter.modify_tensors = noted
        found: dict[str, Any] = {}
        if arguments["mode"] == "full":
            converter.write()
        else:
            converter.prepare_tensors()
            converter.prepare_metadata(vocab_only=False)
            writer = converter.gguf_writer
            writer.write_header_to_file(path=converter.fname_out)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            found = {"header_bytes": file.tell(), "keys": list(writer.kv_data[0])}
            writer.write_padding(file, file.tell())
            data = sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values())
            file.truncate(file.tell() + data)
            writer.close()
    return {"architecture": architecture, "became": became, **found}
