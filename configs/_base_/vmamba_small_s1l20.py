# VMamba-Small s1l20 under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="VMamba",
    arch="small_s1l20",
    drop_path_rate=0.3,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm1_small_0229s_ckpt_epoch_240.pth"),
)
channels = [96, 192, 384, 768]
