# GrootV-Small on ImageNet-1K.
_base_ = "grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(model_name="grootv_small", drop_path_rate=0.3))
