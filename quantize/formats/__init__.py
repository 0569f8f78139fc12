"""Bytes on disk: packing, configs, safetensors and GGUF files. Independent of any model."""
