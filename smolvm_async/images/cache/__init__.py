"""The cache of published images: by content, downloaded once, never removed from under a VM."""

from __future__ import annotations

from smolvm_async.images.cache.images import CachedImage, ImageStore
from smolvm_async.images.cache.layout import Published
from smolvm_async.images.cache.tidying import Damage

__all__ = ["CachedImage", "Damage", "ImageStore", "Published"]
