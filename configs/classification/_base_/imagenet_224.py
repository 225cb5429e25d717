# ImageNet-1K as folders, data/imagenet/{train,val}/<class>/*.JPEG, at 224 pixels.
#
# Other sources through timm, e.g. Hugging Face: dataset.name="hfds/imagenet-1k" with root as its cache folder.
# WebDataset: dataset.type="StreamedClassificationDataset", name="wds/imagenet", root=..., split=... and sampler=None.
data_root = "data/imagenet"
batch_size = 128
exif_orientation = False  # as in the published evaluation

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageClassificationDataset",
        root=data_root,
        split="train",
        is_training=True,
        exif_orientation=exif_orientation,
        max_damaged=10,
        transform=dict(
            input_size=224,
            interpolation="bicubic",
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
        ),
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageClassificationDataset",
        root=data_root,
        split="val",
        exif_orientation=exif_orientation,
        max_damaged=0,
        transform=dict(input_size=224, interpolation="bicubic", crop_pct=224 / 256),
    ),
)
test_dataloader = val_dataloader
