# The published rule for detectors and segmentors: no weight decay on parameters whose official name contains "norm". In
# the stem and the downsamplers the published code numbers the norms, so that they decay, as biases do.
paramwise_cfg = dict(
    custom_keys={
        "norm": dict(decay_mult=0.0),
        "stem.norm": dict(decay_mult=1.0),
        "downsample.norm": dict(decay_mult=1.0),
    }
)
