# The published schedule: 300 epochs of AdamW. The rates are for a total batch of 1024: 20 epochs of warm-up from 1e-6
# towards 1e-3, then a cosine down to 1e-5. It counts all 300 epochs, so it is entered at 0.989 of the peak. Peak, start
# and floor scale with processes x batch_size x accumulative_counts.
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
    dict(
        type="WarmupCosineLR",
        warmup=20,
        end=300,
        start_ratio=1e-3,
        floor_ratio=1e-2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
