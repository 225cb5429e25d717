# VMamba-Base s1l20 under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="VMamba",
    arch="base_s1l20",
    drop_path_rate=0.5,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm1_base_0229s_ckpt_epoch_225.pth"),
)
channels = [128, 256, 512, 1024]
