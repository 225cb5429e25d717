_base_ = "_base_/mask-rcnn_grootv_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_tiny.pth"),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
