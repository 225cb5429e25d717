"""Settings of all detection configs here that mmdet's base configs do not have."""

custom_imports = dict(imports=["grootv.openmmlab", "grootv.openmmlab.dense.detection"], allow_failed_imports=False)

custom_hooks = [
    dict(type="NumClassCheckHook"),
    dict(type="DataFilesHook"),
    dict(type="InvalidLossHook"),
    dict(type="ThroughputHook"),
    dict(type="LearningCurveHook"),
]

# tools/test.py --tta: three sizes, each also flipped.
tta_model = dict(type="InstanceTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100))
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(1333, size), keep_ratio=True) for size in (640, 800, 960)],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", with_bbox=True, with_mask=True)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        "img_id",
                        "img_path",
                        "ori_shape",
                        "img_shape",
                        "scale_factor",
                        "flip",
                        "flip_direction",
                    ),
                )
            ],
        ],
    ),
]
