"""The sound things that are mutated, made once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quantize.formats.safetensors_header import file_header, write_hollow


@dataclass
class Material:
    """A model, its recipe, and a dist in which both of its branches are built.

    Attributes:
        folder: for what is made on the way.
    """

    folder: Path
    model: Path
    recipe: Path
    dist: Path

    @property
    def branch(self) -> Path:
        return next(self.dist.glob("*/main"))

    def hollow(self, folder: Path) -> Path:
        """A copy of the model whose weights are a hole, so that it costs nothing to hash."""
        shutil.copytree(self.model, folder)
        tensors = file_header(folder / "model.safetensors").tensors
        (folder / "model.safetensors").unlink()
        write_hollow(folder / "model.safetensors", tensors)
        return folder

    def gguf(self) -> bytes:
        """A GGUF file of one small tensor, with keys of many types."""
        import numpy as np
        from gguf import GGUFWriter

        path = self.folder / "sound.gguf"
        if not path.is_file():
            writer = GGUFWriter(path, "llama")
            writer.add_name("x")
            writer.add_file_type(15)
            writer.add_uint32("llama.block_count", 1)
            writer.add_uint32("llama.embedding_length", 32)
            writer.add_uint32("llama.context_length", 64)
            writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["<s>", "</s>", "a"])
            writer.add_token_types([3, 3, 1])
            writer.add_chat_template("{{ messages }}")
            writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return path.read_bytes()

    @cached_property
    def halting(self) -> Path:
        """A recipe whose build stops in the last block, by an outcome that it makes an error; the others are kept."""
        import torch
        from safetensors.torch import load_file, save_file

        model = Path(shutil.copytree(self.model, self.folder / "halting"))
        tensors = load_file(model / "model.safetensors")
        blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        tensors[f"model.layers.{blocks - 1}.input_layernorm.weight"] = torch.cat(
            [torch.zeros(8), torch.ones(len(tensors[f"model.layers.{blocks - 1}.input_layernorm.weight"]) - 8)]
        ).half()
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        path = self.folder / "halting.yaml"
        path.write_text(
            f"model: {{source: {model}, name: Halting, creator: Nobody}}\n"
            "calibration: {dataset: pydoc, samples: 1, sequence_length: 16, compute_dtype: float32}\n"
            "gptq: {fail_on: [dead_columns], variants: [{bits: 4, group_size: 32}]}\n"
        )
        return path

    @cached_property
    def unfinished(self) -> Path:
        """A dist that holds the unfinished build of ``halting``."""
        import quantize
        from quantize.errors import SolveError

        dist = self.folder / "unfinished"
        try:
            quantize.build(quantize.load_recipe(self.halting), quantize.BuildOptions(dist=dist, device="cpu"))
        except SolveError:
            pass
        else:
            raise AssertionError("the build was to stop")
        assert any((dist / ".quantize" / "unfinished").iterdir()), "nothing unfinished was left"
        return dist


def make_material(folder: Path) -> Material:
    """Everything anew, for long runs."""
    import quantize
    from tests.tiny import write_model, write_recipe

    model = write_model(folder / "tiny-llama")
    variants = "  variants:\n    - {branch: main, bits: 4, group_size: 32}\n    - {branch: eight, bits: 8}\n"
    recipe = write_recipe(folder / "r.yaml", model, variants, samples=2, compute_dtype="float32")
    quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=folder / "dist", device="cpu"))
    return Material(folder, model, recipe, folder / "dist")
