# VMamba-Base s1l20 on ImageNet-1K: 8 processes of 128 images, 300 epochs at 224 pixels.
_base_ = "_base_/vmamba_in1k.py"

model = dict(backbone=dict(model_name="vmamba_base_s1l20", drop_path_rate=0.5))
