"""Export ``gguf``: files for llama.cpp and Ollama."""

from vlm.export.gguf.support import check_supported
from vlm.export.gguf.write import export_gguf

__all__ = ["check_supported", "export_gguf"]
