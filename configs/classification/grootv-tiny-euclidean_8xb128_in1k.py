# GrootV-Tiny with the Euclidean distance of neighbours: a row of the paper's ablation of the metric.
_base_ = ["grootv-tiny_8xb128_in1k.py"]

model = dict(backbone=dict(metric="euclidean"))
