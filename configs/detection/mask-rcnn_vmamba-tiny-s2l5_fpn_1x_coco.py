_base_ = ["../_base_/vmamba_tiny_s2l5.py", "_base_/mask-rcnn_vmamba_1x_coco.py"]

model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
