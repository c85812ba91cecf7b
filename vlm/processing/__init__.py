"""From messages and image sizes to token ids and label spans, and from pixels to model inputs; no model needed."""

from vlm.processing.encoding import Encoded
from vlm.processing.processing import Processing

__all__ = ["Encoded", "Processing"]
