# A small GrootV on scikit-learn's handwritten digits (grootv.sample_data.export_digits), for a CPU.
_base_ = ["_base_/runtime.py"]

data_root = "data/digits"
batch_size = 64
max_epochs = 30
num_classes = 10

model = dict(
    type="TimmClassifier",
    backbone=dict(model_name="grootv_nano", num_classes=num_classes, drop_path_rate=0.05),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    data_preprocessor=dict(type="ImagePreprocessor", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageClassificationDataset",
        root=data_root,
        split="train",
        is_training=True,
        # Shifts and zooms, but no flips: most mirrored digits are no digits.
        transform=dict(
            input_size=32, interpolation="bicubic", scale=(0.7, 1.0), ratio=(0.85, 1.18), hflip=0.0, color_jitter=0.0
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageClassificationDataset",
        root=data_root,
        split="val",
        transform=dict(input_size=32, interpolation="bicubic", crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=True, base_batch_size=batch_size)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", eta_min_ratio=1e-2, by_epoch=True, begin=2, end=max_epochs, convert_to_iter_based=True
    ),
]

custom_hooks = [*_base_.custom_hooks, dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=2e-2)]
# The held-out digits are the test set, so they do not select a checkpoint.
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best=None))
