"""UperNet on scenes of handwritten digits (tools/make_sample_data.py), some minutes on a CPU with two cores.

Data, sizes and schedule differ from the ADE20K config. The photograph, three quarters of the pixels, has weight 0.2 in
the loss. Images are not mirrored: most mirrored digits are no digits.
"""

_base_ = ["../_base_/grootv_nano.py", "_base_/upernet_grootv_8xb2-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["grootv.openmmlab", "grootv.openmmlab.dense.segmentation"], allow_failed_imports=False)

crop_size = (128, 128)
data_preprocessor = dict(size=crop_size)
class_weight = [0.2] + [1.0] * 10
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=_base_.backbone,
    decode_head=dict(
        in_channels=_base_.channels, channels=64, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        in_channels=_base_.channels[2], channels=64, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
)

data_root = "data/sample/ade"
metainfo = dict(
    classes=("photograph", *"0123456789"),
    palette=[
        [40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
        [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 190],
    ],
)  # fmt: skip
scale = (160, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=scale, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=1.0),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(type="BaseSegDataset", reduce_zero_label=True, data_root=data_root, metainfo=metainfo)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

# It gives the mean over the digits alone and the mean over all classes.
val_evaluator = dict(type="ObjectIoUMetric")
test_evaluator = val_evaluator

train_cfg = dict(max_iters=2000, val_interval=500)
# The heads start from random weights and have few steps, so their learning rate is high. At that rate the backbone's
# deeper maps would all become the same.
optimizer = dict(lr=4e-3)
optim_wrapper = dict(optimizer=optimizer, paramwise_cfg=dict(backbone_lr_mult=0.25))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=50, end=2000),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=500))
