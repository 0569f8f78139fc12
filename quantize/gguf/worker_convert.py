"""Child process: run llama.cpp's converter on one model, with llama.cpp's tree first in ``sys.path``.

Keys of the arguments: ``model`` (a folder), ``out`` (a file), ``outtype``, ``name``, ``metadata`` (a JSON file with the
file's authorship keys), ``mode`` (``full`` or ``header``). ``header`` writes everything except tensor data, which is
left as one large hole: enough for llama.cpp to report types and sizes. The answer maps each tensor of the checkpoint to
its GGUF tensors (``became``); for a header it also has its size in bytes and its keys.
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
        converted: dict[str, list[str]] = {}
        modify = converter.modify_tensors

        def recording(data: Any, name: str, bid: int | None) -> Any:
            for new_name, tensor in modify(data, name, bid):
                converted.setdefault(name, []).append(new_name)
                yield new_name, tensor

        converter.modify_tensors = recording
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
    return {"architecture": architecture, "became": converted, **found}
