_base_ = ["../_base_/grootv_small.py", "_base_/mask-rcnn_grootv_1x_coco.py"]

model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
