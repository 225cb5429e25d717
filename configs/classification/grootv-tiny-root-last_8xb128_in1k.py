# GrootV-Tiny with the last pixel as the only root: a row of the paper's ablation of the root.
_base_ = ["grootv-tiny_8xb128_in1k.py"]

model = dict(backbone=dict(root="last"))
