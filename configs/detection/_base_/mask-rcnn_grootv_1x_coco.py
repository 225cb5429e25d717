"""Mask R-CNN with an FPN on COCO as published for GrootV: AdamW, batch 16 (8 GPUs x 2 images), 12 epochs."""

_base_ = [
    *__import__("grootv.openmmlab", fromlist=["base_configs"]).base_configs(
        "mmdet",
        "_base_/models/mask-rcnn_r50_fpn.py",
        "_base_/datasets/coco_instance.py",
        "_base_/schedules/schedule_1x.py",
        "_base_/default_runtime.py",
    ),
    "grootv_runtime.py",
]

model = dict(backbone=dict(_delete_=True, type="GrootV"))

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
# The paper gives AdamW and its learning rate; weight decay and drop path are those of comparable backbones.
optim_wrapper = dict(
    constructor="TimmOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=3))
