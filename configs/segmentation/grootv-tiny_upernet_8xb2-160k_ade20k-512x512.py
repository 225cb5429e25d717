_base_ = "_base_/upernet_grootv_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_tiny.pth"),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
