_base_ = "_base_/mask-rcnn_grootv_1x_coco.py"

model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_small.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
