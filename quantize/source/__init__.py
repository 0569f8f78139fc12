"""Read a source model: hub or local snapshot, GGUF, safetensors headers; stream its blocks one at a time."""

from quantize.source.checkpoint import Checkpoint, read_checkpoint
from quantize.source.resolve import resolve
from quantize.source.resolved import Source

__all__ = ["Checkpoint", "Source", "read_checkpoint", "resolve"]
