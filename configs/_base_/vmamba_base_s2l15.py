# VMamba-Base s2l15 under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="VMamba",
    arch="base_s2l15",
    drop_path_rate=0.6,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_base_0229_ckpt_epoch_237.pth"),
)
channels = [128, 256, 512, 1024]
