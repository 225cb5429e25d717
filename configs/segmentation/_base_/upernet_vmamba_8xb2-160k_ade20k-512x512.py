"""UperNet on ADE20K as published for VMamba: as for GrootV, with another warm-up and another rule of weight decay."""

_base_ = ["upernet_grootv_8xb2-160k_ade20k-512x512.py", "../../_base_/vmamba_weight_decay.py"]

optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor", paramwise_cfg=dict(**_base_.paramwise_cfg, _delete_=True)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
