# GrootV-Tiny that scans the pixels row by row: a row of the paper's ablation of the scan.
_base_ = ["grootv-tiny_8xb128_in1k.py"]

model = dict(backbone=dict(scan="raster"))
