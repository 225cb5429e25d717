"""A one-stage detector: mmdet's config of GFL with GrootV-Tiny and the optimizer of the Mask R-CNN configs."""

_base_ = [
    *__import__("grootv.openmmlab", fromlist=["base_configs"]).base_configs("mmdet", "gfl/gfl_r50_fpn_1x_coco.py"),
    "../_base_/grootv_tiny.py",
    "_base_/grootv_runtime.py",
]

model = dict(
    backbone=dict(**_base_.backbone, _delete_=True, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.channels[1:], start_level=0),
)

optim_wrapper = dict(
    constructor="TimmOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=3))
