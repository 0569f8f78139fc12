"""Bytes on disk: packing, configs, safetensors files. Knows no model."""
