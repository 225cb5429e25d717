"""UperNet on ADE20K as published for GrootV: AdamW, 160k iterations of 16 images (8 GPUs x 2) of 512 x 512.

tools/test.py gives the single-scale result, with --tta that of six sizes, each also flipped.
"""

_base_ = __import__("grootv.openmmlab", fromlist=["base_configs"]).base_configs(
    "mmseg",
    "_base_/models/upernet_r50.py",
    "_base_/datasets/ade20k.py",
    "_base_/schedules/schedule_160k.py",
    "_base_/default_runtime.py",
)
custom_imports = dict(imports=["grootv.openmmlab"], allow_failed_imports=False)

data_preprocessor = dict(size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(_delete_=True, type="GrootV"),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)

train_dataloader = dict(batch_size=2)

# The paper gives AdamW, its learning rate and schedule; weight decay and drop path are those of comparable backbones.
optimizer = dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
optim_wrapper = dict(
    constructor="TimmOptimWrapperConstructor", paramwise_cfg=dict(layer_decay=1.0), optimizer=optimizer
)
param_scheduler = [
    # From a learning rate of 1e-6.
    dict(type="LinearLR", start_factor=1 / 60, by_epoch=False, begin=0, end=1600),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1600, end=160000),
]
default_hooks = dict(checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=3))
custom_hooks = [
    dict(type="ClassCountHook"),
    dict(type="DataFilesHook"),
    dict(type="InvalidLossHook"),
    dict(type="ThroughputHook"),
    dict(type="LearningCurveHook"),
]
