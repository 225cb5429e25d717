# GrootV-Tiny that scans the pixels row by row, in both directions.
_base_ = ["grootv-tiny_8xb128_in1k.py"]

model = dict(backbone=dict(scan="bidirectional"))
