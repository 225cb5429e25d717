_base_ = ["../_base_/vmamba_base_s2l15.py", "_base_/upernet_vmamba_8xb2-160k_ade20k-512x512.py"]

model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
