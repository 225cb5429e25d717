"""Detection and segmentation with mmdetection, mmsegmentation and other projects on mmengine.

The modules `detection` and `segmentation` need mmdet and mmseg; configs that use them import them by name.
"""

from . import backbone, data_files, pictures

__all__ = ["backbone", "data_files", "pictures"]
