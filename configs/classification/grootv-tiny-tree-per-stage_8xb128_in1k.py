# GrootV-Tiny with one tree for all blocks of a stage: a row of the paper's ablation.
_base_ = ["grootv-tiny_8xb128_in1k.py"]

model = dict(backbone=dict(tree_per="stage"))
