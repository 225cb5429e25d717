# VMamba-Tiny s2l5 under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="VMamba",
    arch="tiny_s2l5",
    drop_path_rate=0.2,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_tiny_0230_ckpt_epoch_262.pth"),
)
channels = [96, 192, 384, 768]
