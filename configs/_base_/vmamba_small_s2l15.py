# VMamba-Small s2l15 under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="VMamba",
    arch="small_s2l15",
    drop_path_rate=0.3,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_small_0229_ckpt_epoch_222.pth"),
)
channels = [96, 192, 384, 768]
