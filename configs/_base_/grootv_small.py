# GrootV-Small under a detector or segmentor, from the checkpoint of its ImageNet training.
backbone = dict(
    type="GrootV",
    arch="small",
    drop_path_rate=0.3,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/grootv_small.pth"),
)
channels = [96, 192, 384, 768]
