_base_ = ["../_base_/vmamba_small_s2l15.py", "_base_/mask-rcnn_vmamba_ms-crop-3x_coco.py"]

model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
