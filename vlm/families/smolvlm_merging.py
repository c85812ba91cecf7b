"""SmolVLM in mixed precision: image features meet the text's embeddings in the embeddings' own precision.

In training, some weights are float32 and others are not, and autocast computes in a third way. The copy of features into
the embeddings allows no two types. Idefics3 casts them; SmolVLM does not, or to the type of the tower's first weight:

    transformers 5.17   connector(...)                          -> index_put
    transformers 5.23   connector(...).to(model.dtype)          -> masked_scatter
    here                connector(...).to(embeddings' dtype)    -> either
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def merge_in_one_precision(model: Any) -> None:
    """Makes the embeddings' precision that of image features, too.

    Args:
        model: A `SmolVLMForConditionalGeneration`, changed in place.
    """
    inner = model.model
    stock = type(inner)
    # `dtype` is a property of the class, so only a subclass can say something else. It keeps the names of the stock class,
    # by which transformers looks up some of what it knows of it.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    inner.__class__ = type(stock.__name__, (stock,), {**names, "dtype": property(_embeddings_dtype)})
    inner.connector.register_forward_hook(partial(_cast, inner))


def _embeddings_dtype(inner: Any) -> torch.dtype:
    return inner.get_input_embeddings().weight.dtype


def _cast(inner: Any, connector: Any, args: Any, features: torch.Tensor) -> torch.Tensor:
    return features.to(_embeddings_dtype(inner))
