# GrootV-Tiny under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="GrootV",
    arch="tiny",
    drop_path_rate=0.2,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_tiny.pth"),
)
channels = [80, 160, 320, 640]
