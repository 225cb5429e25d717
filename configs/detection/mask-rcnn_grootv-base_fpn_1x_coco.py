_base_ = "_base_/mask-rcnn_grootv_1x_coco.py"

model = dict(
    backbone=dict(
        arch="base",
        drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_base.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
