# GrootV-Base under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="GrootV",
    arch="base",
    drop_path_rate=0.6,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_base.pth"),
)
channels = [128, 256, 512, 1024]
