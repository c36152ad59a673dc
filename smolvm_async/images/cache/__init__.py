"""The cache of published images. It stores each file once, and keeps a file while a VM needs it."""

from __future__ import annotations

from smolvm_async.images.cache.images import CachedImage, ImageStore
from smolvm_async.images.cache.layout import Published
from smolvm_async.images.cache.tidying import Damage

__all__ = ["CachedImage", "Damage", "ImageStore", "Published"]
