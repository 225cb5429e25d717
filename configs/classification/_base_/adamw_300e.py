# 300 epochs of AdamW for a total batch of 1024: warm-up from 5e-7 in 20 epochs to 1e-3, then a cosine to 5e-6, both by
# iteration. The rates grow and shrink with processes x batch_size x accumulative_counts.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # Set layer_decay below 1, e.g. 0.75, when fine-tuning.
    paramwise_cfg=dict(layer_decay=1.0),
    clip_grad=dict(max_norm=5.0),
    accumulative_counts=1,
)
auto_scale_lr = dict(enable=True, base_batch_size=1024)

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-4, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=5e-3, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
