# GrootV-Tiny on ImageNet-1K: 8 processes of 128 images, 300 epochs at 224 pixels.
_base_ = ["_base_/imagenet_224.py", "_base_/adamw_300e.py", "_base_/runtime.py"]

model = dict(
    type="TimmClassifier",
    backbone=dict(model_name="grootv_tiny", num_classes=1000, drop_path_rate=0.1),
    data_preprocessor=dict(
        type="ImagePreprocessor",
        random_erasing=dict(probability=0.25, mode="pixel"),
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=1000),
    ),
)

# Decay 0.9999 in timm's terms. Validation uses the averaged weights, and they are the state_dict of checkpoints.
custom_hooks = [*_base_.custom_hooks, dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1e-4)]
