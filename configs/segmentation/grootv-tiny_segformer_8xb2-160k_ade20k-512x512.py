"""Another segmentor: SegFormer's all-MLP head, with the backbone, data and schedule of the UperNet config."""

_base_ = "grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="SegformerHead",
        in_channels=_base_.channels,
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
