# Settings of all classification runs, apart from data, model and schedule.
custom_imports = dict(imports=["grootv.openmmlab"], allow_failed_imports=False)
default_scope = "mmengine"

val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    runtime_info=dict(type="RuntimeInfoHook"),
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="AtomicCheckpointHook", interval=1, max_keep_ckpts=3, save_best="accuracy/top1", rule="greater"
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="IterationSeedHook"),
    dict(type="InvalidLossHook"),
    dict(type="ClassCountHook"),
    dict(type="DamagedImagesHook"),
    dict(type="ThroughputHook"),
    dict(type="TimmCheckpointHook"),
    dict(type="LearningCurveHook", metrics=["accuracy/top1", "accuracy/top5"]),
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
log_processor = dict(window_size=50, by_epoch=True)
log_level = "INFO"
randomness = dict(seed=0)
load_from = None
resume = False
