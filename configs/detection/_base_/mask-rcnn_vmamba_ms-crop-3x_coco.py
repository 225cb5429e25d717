"""The 3x schedule as published for VMamba: as for GrootV, with another rule of weight decay."""

_base_ = ["mask-rcnn_grootv_ms-crop-3x_coco.py", "../../_base_/vmamba_weight_decay.py"]

optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor", paramwise_cfg=dict(**_base_.paramwise_cfg, _delete_=True)
)
