# GrootV-Nano under a detector or segmentor of the demonstrations, which name its checkpoint on the command line.
backbone = dict(type="GrootV", arch="nano", drop_path_rate=0.0)
channels = [32, 64, 128, 256]
