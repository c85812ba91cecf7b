"""Export ``gguf``: files for llama.cpp and Ollama (`vlm.export.gguf.write`), if they can be (`vlm.export.gguf.support`)."""
