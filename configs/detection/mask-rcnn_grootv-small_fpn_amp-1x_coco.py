_base_ = "mask-rcnn_grootv-small_fpn_1x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic")
