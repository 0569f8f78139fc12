"""GGUF: llama.cpp's converter and quantizer run as children; the importance matrix comes from our own statistics."""
