# VMamba-Tiny s1l8 under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="VMamba",
    arch="tiny_s1l8",
    drop_path_rate=0.2,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
)
channels = [96, 192, 384, 768]
