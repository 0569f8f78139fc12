"""GGUF: llama.cpp's converter and quantizer run in child processes; the importance matrix comes from our statistics."""
