"""Image classification with any timm model: the classifier, data sets, metrics and hooks that only it needs."""

from . import classifier, datasets, hooks, images, metrics

__all__ = ["classifier", "datasets", "hooks", "images", "metrics"]
