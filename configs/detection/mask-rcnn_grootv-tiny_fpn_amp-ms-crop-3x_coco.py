_base_ = "mask-rcnn_grootv-tiny_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic")
