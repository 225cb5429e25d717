# The published ImageNet-1K recipe of VMamba: that of GrootV, but for a cosine that counts the epochs after the warm-up.
_base_ = ["imagenet_224.py", "adamw_300e.py", "runtime.py"]

model = dict(
    type="TimmClassifier",
    backbone=dict(num_classes=1000),
    data_preprocessor=dict(
        type="ImagePreprocessor",
        random_erasing=dict(probability=0.25, mode="pixel"),
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=1000),
    ),
)
param_scheduler = [dict(**_base_.param_scheduler[0], cosine_after_warmup=True)]

# Decay 0.9999 in timm's terms. Validation uses the averaged weights, and they are the state_dict of checkpoints.
custom_hooks = [*_base_.custom_hooks, dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1e-4)]
