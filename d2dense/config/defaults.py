"""The yacs keys that all projects share, on top of Detectron2's own. One comment per key; readers
are named.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as _detectron2_cfg

from d2dense import (
    modeling,  # noqa: F401  registers its classes
    projects,
)

__all__ = ["add_d2dense_config", "get_cfg"]


def get_cfg() -> CN:
    """Return Detectron2's default config with the shared keys and every project's keys added."""
    cfg = _detectron2_cfg()
    add_d2dense_config(cfg)
    projects.add_project_configs(cfg)
    return cfg


def add_d2dense_config(cfg: CN) -> None:
    """Add the shared keys to ``cfg`` in place (the lazy counterpart is
    :mod:`d2dense.config.common`).
    """
    _add_data_keys(cfg)
    _add_solver_keys(cfg)
    _add_run_keys(cfg)
    _add_detector_keys(cfg)
    _add_semantic_keys(cfg)
    _add_timm_keys(cfg)
    _add_transformer_keys(cfg)
    _add_detr_keys(cfg)
    _add_detr_loss_keys(cfg)


def _add_data_keys(cfg: CN) -> None:
    # Datasets without Python: DATASETS.CUSTOM.TRAIN.JSON, ....IMAGES and so on, see
    # data/datasets.py. The slot TRAIN becomes the training set; VAL, TEST and every other slot
    # become test sets, unless the config names custom sets.
    cfg.DATASETS.CUSTOM = CN(new_allowed=True)
    # "check": the model's class count must equal the data's; "auto": it is taken from the data.
    cfg.DATASETS.CLASS_COUNT = "check"
    # Share of the training samples that may be unreadable (they are replaced) before the run stops;
    # 0 stops at the first.
    cfg.DATALOADER.MAX_BAD_SHARE = 0.1
    # Images per batch in evaluation, per process.
    cfg.DATALOADER.TEST_BATCH_SIZE = 1
    # Which recipe of data/augmentations.py the mapper uses: "default", "detr", "lsj" or "semantic";
    # or "padded_crops" (data/semantic_augmentations.py), "classification" (data/classification.py).
    cfg.INPUT.MAPPER = "default"
    # Recompute boxes from the augmented masks (tighter after crops).
    cfg.INPUT.RECOMPUTE_BOXES = False
    # Objects whose box has a side of at most this many pixels after augmentation are dropped.
    cfg.INPUT.MIN_BOX_SIDE = 1e-5
    # Take another image where that drops all objects that are in view.
    cfg.INPUT.REJECT_EMPTIED = False
    # "detr": shorter sides to choose from before the crop, and the crop's size range in pixels.
    cfg.INPUT.DETR = CN({"CROP_MIN_SIZES": (400, 500, 600), "CROP_RANGE": (384, 600)})
    # "lsj": side of the square training image, the range of its random scale, and the value of its
    # padding for all channels or for each.
    cfg.INPUT.LSJ = CN({"IMAGE_SIZE": 1024, "MIN_SCALE": 0.1, "MAX_SCALE": 2.0})
    cfg.INPUT.LSJ.PAD_VALUE = (128.0,)
    # Paste objects of a second image into a share PROB of the training images (the other keys are
    # explained in data/copy_paste.py). CORRECTED: by shape, and what is covered is cut off.
    cfg.INPUT.COPY_PASTE = CN({"ENABLED": False, "PROB": 0.5, "MAX_IOU": 0.2, "MAX_OBJECTS": 7})
    cfg.INPUT.COPY_PASTE.MARGIN = 15
    cfg.INPUT.COPY_PASTE.CORRECTED = False
    cfg.INPUT.COPY_PASTE.MIN_VISIBLE = 0.25
    # ANY_NUMBER: as many as a draw says. MIN_PIXELS: a rule instead of MIN_VISIBLE; None is none.
    cfg.INPUT.COPY_PASTE.ANY_NUMBER = False
    cfg.INPUT.COPY_PASTE.MIN_PIXELS = None
    cfg.INPUT.COPY_PASTE.MAX_SHIFT = 10.0
    # Nothing is pasted without masks; images without objects get some too.
    cfg.INPUT.COPY_PASTE.MASKS_ONLY = False
    cfg.INPUT.COPY_PASTE.INTO_EMPTY = False
    # "semantic", "padded_crops": photometric distortion, and (not "padded_crops") the largest
    # share one class may have in a crop.
    cfg.INPUT.COLOR_DISTORTION = True
    # "semantic": range of a random factor on MIN_SIZE_TRAIN and MAX_SIZE_TRAIN (() for none), and
    # the distance between factors (0 for any); see RandomScale in data/augmentations.py.
    # "padded_crops": of a factor on the image's own size.
    cfg.INPUT.SCALE_RANGE = ()
    cfg.INPUT.SCALE_STEP = 0.0
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # "padded_crops", of CROP.SIZE: value of the padding for all channels or for each, ranges of the
    # factors on contrast and saturation (COLOR_DISTORTION), largest shift of the brightness.
    cfg.INPUT.PADDED_CROPS = CN({"PAD_VALUE": (127.5,), "BRIGHTNESS": 32.0})
    cfg.INPUT.PADDED_CROPS.CONTRAST = (0.5, 1.5)
    cfg.INPUT.PADDED_CROPS.SATURATION = (0.5, 1.5)
    # "classification": side of the square pictures; shorter edge before the central one is cut out
    # in tests; in training, range of a random part's area, probability of a flip, timm's policy and
    # otherwise the strength of colour jitter, probability of random erasing.
    cfg.INPUT.CLASSIFICATION = CN({"SIZE": 224, "TEST_RESIZE": 256, "SCALE": (0.08, 1.0)})
    cfg.INPUT.CLASSIFICATION.FLIP = 0.5
    cfg.INPUT.CLASSIFICATION.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    cfg.INPUT.CLASSIFICATION.COLOR_JITTER = 0.4
    cfg.INPUT.CLASSIFICATION.RANDOM_ERASING = 0.25
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = "bicubic"


def _add_solver_keys(cfg: CN) -> None:
    # "SGD" or "AdamW" (engine/experiment.py); BETAS are AdamW's.
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # Layer-wise lr decay: layer k of n gets lr * rate^(n - k); 1.0 is off.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Pairs [part of a parameter's name, factor on its lr]; the first match counts.
    cfg.SOLVER.LR_MULTIPLIERS = []
    # Weight decay of parameters with at most one dimension (layer scales, norms, biases) where
    # WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS say nothing; None is no rule.
    cfg.SOLVER.WEIGHT_DECAY_1D = None
    # Weight decay of everything outside the backbone (pyramids around one are outside), norms and
    # biases included; None is no rule.
    cfg.SOLVER.WEIGHT_DECAY_HEADS = None
    # Parameters whose name holds one of these get no weight decay.
    cfg.SOLVER.NO_DECAY_NAMES = ()
    # LR_SCHEDULER_NAME "WarmupPolyLR": lr * (1 - t)^power, down to BASE_LR_END. ("WarmupCosineLR"
    # is Detectron2's; the cosine of "CosineAfterWarmupLR" begins at the end of the warm-up.)
    cfg.SOLVER.POLY_POWER = 0.9
    # Autocast type: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Batches of IMS_PER_BATCH / ACCUMULATION_STEPS whose gradients add up to one step.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # How the learning rates follow IMS_PER_BATCH / REFERENCE_BATCH: "none", "linear" or "sqrt".
    # (Detectron2's own REFERENCE_WORLD_SIZE scales batch, rate and schedule with the processes.)
    cfg.SOLVER.LR_SCALING = CN({"RULE": "none", "REFERENCE_BATCH": 16})
    # How many periodic checkpoints stay; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # Exponential moving average of the weights: decay per step, ramped up when WARMUP or else by a
    # TIME_CONSTANT in steps (0: not), see engine/ema.py; used in evaluation when EVAL.
    cfg.SOLVER.EMA = CN({"ENABLED": False, "DECAY": 0.9998, "WARMUP": False, "EVAL": True})
    cfg.SOLVER.EMA.TIME_CONSTANT = 0.0


def _add_run_keys(cfg: CN) -> None:
    cfg.TRAIN = CN()
    # Steps between two log lines; losses are read from the device only then.
    cfg.TRAIN.LOG_PERIOD = 20
    cfg.TRAIN.CHANNELS_LAST = False
    cfg.TRAIN.COMPILE = False
    # Recompute activations in backward for every module that offers set_grad_checkpointing().
    cfg.TRAIN.ACTIVATION_CHECKPOINTING = False
    cfg.TRAIN.FIND_UNUSED_PARAMETERS = False
    # What the processes share out: "none", "zero1" (optimizer state) or "fsdp" (weights too).
    cfg.TRAIN.SHARDING = "none"
    # A loss or gradient that is not finite: "raise" ends the run, "skip" leaves the step out, up to
    # MAX_SKIPS times.
    cfg.TRAIN.NON_FINITE = CN({"POLICY": "raise", "MAX_SKIPS": 20})
    # Initial weights of another shape (other classes) keep their fresh values instead of being an
    # error; of queries the rows that both have are loaded.
    cfg.TRAIN.REINIT_MISSHAPED = False
    # The same, but what belongs to classes is loaded by their names: a dataset, or an annotation
    # file, with the classes of the initial weights (checkpoint/rows.py).
    cfg.TRAIN.INIT_CLASSES = ""
    # Pickled model files can run code; they load only with this set.
    cfg.TRAIN.ALLOW_PICKLE = False
    # Metric that decides model_best.pth and early stop, e.g. "bbox/AP" or
    # "name_of_test_set/bbox/AP".
    cfg.TEST.BEST_METRIC = ""
    cfg.TEST.BEST_MODE = "max"
    # Evaluations without a new best before the run stops; 0 is off.
    cfg.TEST.EARLY_STOP_PATIENCE = 0
    # With Detectron2's AUG.ENABLED, --eval-only and predictions see the original image at several
    # sizes; a detector's boxes become one set by soft suppression, "linear" from an IoU on or
    # "gaussian", and by box voting at VOTING_IOU (None: not). See modeling/multi_scale.py.
    cfg.TEST.AUG.METHOD = "linear"
    cfg.TEST.AUG.IOU = 0.5
    cfg.TEST.AUG.SIGMA = 0.5
    cfg.TEST.AUG.MIN_SCORE = 1e-3
    cfg.TEST.AUG.VOTING_IOU = None
    cfg.TEST.AUG.MAX_DETECTIONS = 300
    # META_ARCHITECTURE "Segmenter" goes over an image in windows of WINDOW (height, width) pixels,
    # STRIDE apart (() for two thirds of the window), at most MAX_WINDOWS at once; a WINDOW of ()
    # is the whole image. The arguments are explained in modeling/semantic_inference.py.
    cfg.TEST.SEM_SEG = CN({"WINDOW": (), "STRIDE": (), "MAX_WINDOWS": 4})
    # With MULTI_SCALE the image is seen at RATIOS of its size, mirrored too with FLIP, and
    # "probabilities" or "logits" are averaged.
    cfg.TEST.SEM_SEG.MULTI_SCALE = False
    cfg.TEST.SEM_SEG.RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    cfg.TEST.SEM_SEG.FLIP = True
    cfg.TEST.SEM_SEG.AVERAGE = "probabilities"
    cfg.TEST.SEM_SEG.KEEP_ODD = False
    cfg.TEST.SEM_SEG.ALIGN_CORNERS = False
    # Whole images are first filled up to PAD_TO (height, width; () for no such size), and to 1 more
    # than a multiple of PAD_STEP, with the grey value PAD_VALUE (None: zeros after normalisation).
    cfg.TEST.SEM_SEG.PAD_TO = ()
    cfg.TEST.SEM_SEG.PAD_STEP = 0
    cfg.TEST.SEM_SEG.PAD_VALUE = None
    # What is written and measured beside the confusion matrix: the boundary IoU, and a label map
    # per image in the benchmark's own format (evaluation/sem_seg.py).
    cfg.TEST.SEM_SEG.BOUNDARY_IOU = False
    cfg.TEST.SEM_SEG.SUBMISSION = False


def _add_detector_keys(cfg: CN) -> None:
    # META_ARCHITECTURE "BatchRetinaNet" (modeling/retinanet.py): losses are divided by the
    # "positives" of the batch, or by their "running_average" as in Detectron2.
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = "positives"
    # Anchors that overlap an object most, at any IoU (modeling/matcher.py): "none" of them are
    # positive, or they get the object that they overlap "best", or their "own".
    cfg.MODEL.RETINANET.LOW_QUALITY_MATCHES = "best"
    # ROI_HEADS.NAME "FlexibleCascadeROIHeads" (modeling/cascade.py): factor of each stage's losses,
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS = [1.0, 1.0, 1.0]
    # whether gradients at the pooled features are divided by the number of stages,
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.SCALE_GRADIENTS = True
    # what is averaged over the stages ("probabilities" or "logits"),
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.SCORE_AVERAGE = "probabilities"
    # and whether each stage has a mask head of its own.
    cfg.MODEL.ROI_MASK_HEAD.PER_STAGE = False


def _add_semantic_keys(cfg: CN) -> None:
    # META_ARCHITECTURE "Segmenter" (modeling/segmenter.py): (height, width) that training images
    # are at least filled up to; () for no such size.
    cfg.MODEL.SEM_SEG_HEAD.PAD_TO = ()
    # META_ARCHITECTURE "ImageClassifier" (modeling/classification.py): its network, by its name in
    # CLASSIFIER_REGISTRY ("timm_classifier" reads MODEL.TIMM),
    cfg.MODEL.CLASSIFIER = CN({"NAME": "timm_classifier", "NUM_CLASSES": 1000})
    # factor on the initial weights of the last layers (not timm's): with few classes, 1 starts from
    # scores that are far too large,
    cfg.MODEL.CLASSIFIER.INIT_SCALE = 1.0
    # factors of the losses of a network's heads ([] for their mean), and label smoothing;
    cfg.MODEL.CLASSIFIER.HEAD_WEIGHTS = []
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # mixing of image pairs: alphas of mixup and CutMix (0 is off), how often any is done, and how
    # often it is CutMix where both are on.
    cfg.MODEL.CLASSIFIER.MIXUP = 0.0
    cfg.MODEL.CLASSIFIER.CUTMIX = 0.0
    cfg.MODEL.CLASSIFIER.MIX_PROB = 1.0
    cfg.MODEL.CLASSIFIER.MIX_SWITCH_PROB = 0.5
    # SEM_SEG_HEAD.NAME "UperNetHead" (modeling/upernet.py), CONVS_DIM wide: sides of the pooled
    # grids, dropout before the classifiers,
    cfg.MODEL.SEM_SEG_HEAD.POOL_SCALES = (1, 2, 3, 6)
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # and the map that gets a classifier of its own in training ("" for none).
    cfg.MODEL.SEM_SEG_HEAD.AUXILIARY = CN({"FEATURE": "", "CHANNELS": 256, "LOSS_WEIGHT": 0.4})


def _add_timm_keys(cfg: CN) -> None:
    # BACKBONE.NAME "TimmBackbone" or a pyramid around it, "build_timm_fpn_backbone" and
    # "build_retinanet_timm_<fpn|bifpn|nas_fpn|hrfpn>_backbone" (modeling/timm_pyramids.py): to what
    # multiple batches are filled up (0: the coarsest stride below it), and how often BiFPN or
    # NAS-FPN repeats its layers;
    cfg.MODEL.FPN.SIZE_DIVISIBILITY = 0
    cfg.MODEL.FPN.NUM_REPEATS = 7
    # timm's name of the model (modeling/timm_backbone.py),
    cfg.MODEL.TIMM = CN({"NAME": "convnext_tiny"})
    # which of its feature maps (-1 is the last), and which of them are returned ("res2"...; none
    # named: all, or those that the pyramid around it takes),
    cfg.MODEL.TIMM.OUT_INDICES = [-4, -3, -2, -1]
    cfg.MODEL.TIMM.OUT_FEATURES = []
    # drop path of the last block,
    cfg.MODEL.TIMM.DROP_PATH = 0.0
    # what batch norms become ("FrozenBN", "SyncBN", "" to stay), and the norm of feature maps,
    cfg.MODEL.TIMM.NORM = ""
    cfg.MODEL.TIMM.OUT_NORM = ""
    # eps of the model's norms and momentum of its batch norms (None: timm's),
    cfg.MODEL.TIMM.NORM_EPS = None
    cfg.MODEL.TIMM.NORM_MOMENTUM = None
    # whether sizes are rounded up where ConvNeXt rounds them down, and to what multiple batches are
    # filled up (0: none; None: the largest stride),
    cfg.MODEL.TIMM.SAME_PADDING = False
    cfg.MODEL.TIMM.SIZE_DIVISIBILITY = None
    # and initial weights: timm's own, or a file.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Further arguments of timm's constructor in capitals, such as DEPTHS: [1, 1, 2, 1].
    cfg.MODEL.TIMM.OPTIONS = CN(new_allowed=True)
    # BACKBONE.NAME "LateStrideResNet" (modeling/late_stride_resnet.py), a ResNet that MODEL.TIMM
    # describes: stride of its last stages (32, 16 or 8), and dilations of the last one's blocks.
    cfg.MODEL.LATE_STRIDE = CN({"OUTPUT_STRIDE": 32, "MULTI_GRID": (1, 2, 4)})


def _add_transformer_keys(cfg: CN) -> None:
    # BACKBONE.NAME "Swin" (modeling/swin.py): width of "res2", blocks and heads of the stages, side
    # of the windows,
    cfg.MODEL.SWIN = CN({"EMBED_DIM": 96, "DEPTHS": (2, 2, 6, 2), "HEADS": (3, 6, 12, 24)})
    cfg.MODEL.SWIN.WINDOW = 7
    # drop path of the last block, which maps are returned, and to what multiple batches are filled
    # up (0: none).
    cfg.MODEL.SWIN.DROP_PATH = 0.2
    cfg.MODEL.SWIN.OUT_FEATURES = ("res2", "res3", "res4", "res5")
    cfg.MODEL.SWIN.SIZE_DIVISIBILITY = 0
    # BACKBONE.NAME "EVA02ViT" (modeling/vit.py) or Detectron2's, "ViTDet" (modeling/vitdet.py),
    # which explain the sizes; their map is "res4";
    cfg.MODEL.VIT = CN({"CHANNELS": 1024, "DEPTH": 24, "HEADS": 16, "PATCH": 16})
    cfg.MODEL.VIT.MLP_RATIO = 8 / 3
    # side of the windows in tokens, and the blocks that attend everywhere,
    cfg.MODEL.VIT.WINDOW = 24
    cfg.MODEL.VIT.GLOBAL_BLOCKS = (3, 7, 11, 15, 19, 23)
    # side of the grid of learned positions; of the grid to which EVA02ViT's global blocks scale
    # their rotary ones (None: each map's own); and of the images, in pixels, whose tokens ViTDet's
    # have relative ones for,
    cfg.MODEL.VIT.POSITION_SIDE = 32
    cfg.MODEL.VIT.ROTARY_SIDE = None
    cfg.MODEL.VIT.IMAGE_SIZE = 1024
    # drop path of the last block, and to what multiple batches are filled up (EVA02ViT).
    cfg.MODEL.VIT.DROP_PATH = 0.4
    cfg.MODEL.VIT.SIZE_DIVISIBILITY = 32
    # BACKBONE.NAME "ViTPyramid" (modeling/necks/vit_pyramid.py), FPN.OUT_CHANNELS wide: the
    # registered backbone below it, and its levels, some of p2 to p7.
    cfg.MODEL.VIT_PYRAMID = CN({"BODY": "EVA02ViT", "LEVELS": ["p2", "p3", "p4", "p5", "p6"]})


def _add_detr_keys(cfg: CN) -> None:
    # META_ARCHITECTURE "DeformableDETR" (modeling/detr): the backbone's feature maps, finest first,
    cfg.MODEL.DETR = CN({"IN_FEATURES": ["p3", "p4", "p5", "p6"]})
    # what makes levels of them: "none", "channel_mapper" (any widths, adds coarser levels),
    # "projection" (the same without norms), or "simple_pyramid" (the coarsest LEVELS of p2 to p6
    # from the map at stride 16),
    cfg.MODEL.DETR.NECK = "none"
    # how many levels, and their channels,
    cfg.MODEL.DETR.LEVELS = 4
    cfg.MODEL.DETR.CHANNELS = 256
    cfg.MODEL.DETR.NUM_CLASSES = 80
    cfg.MODEL.DETR.NUM_QUERIES = 300
    cfg.MODEL.DETR.ENCODER_LAYERS = 6
    cfg.MODEL.DETR.DECODER_LAYERS = 6
    # attention heads, and the points that each reads per level,
    cfg.MODEL.DETR.HEADS = 8
    cfg.MODEL.DETR.POINTS = 4
    # width inside the perceptrons, and dropout,
    cfg.MODEL.DETR.FEEDFORWARD = 1024
    cfg.MODEL.DETR.DROPOUT = 0.1
    # its encoder, queries and decoder: "deformable", or of one level "conditional" or "dab", whose
    # refinement, norms and positions are fixed (modeling/detr/single_scale.py),
    cfg.MODEL.DETR.TRANSFORMER = "deformable"
    # the sine encoding of positions,
    cfg.MODEL.DETR.POSITION_TEMPERATURE = 10000.0
    cfg.MODEL.DETR.POSITION_OFFSET = -0.5
    # whether each decoder layer starts from the boxes of the one before, and has heads of its own,
    cfg.MODEL.DETR.BOX_REFINEMENT = False
    # whose losses reach the box head of the one before too, how close to 0 and 1 references count,
    # and a norm of the states that heads see but refinement does not,
    cfg.MODEL.DETR.LOOK_FORWARD_TWICE = False
    cfg.MODEL.DETR.REFERENCE_EPS = 1e-5
    cfg.MODEL.DETR.FINAL_NORM = False
    # whether the decoder starts from the encoder's predictions, whether class 0 stands for any
    # object there (else all classes count, and only what is chosen has a loss),
    cfg.MODEL.DETR.TWO_STAGE = False
    cfg.MODEL.DETR.BINARY_PROPOSALS = True
    # whether queries bring their positions ("queries") or each layer makes them ("references"),
    cfg.MODEL.DETR.QUERY_POSITIONS = "queries"
    # noised queries (modeling/detr/denoising.py): how many, 0 for none, and their noise,
    cfg.MODEL.DETR.DENOISING = CN({"QUERIES": 0, "LABEL_NOISE": 0.5, "BOX_NOISE": 1.0})
    # queries for REPEATS copies of each object, in training (modeling/detr/one_to_many.py): how
    # many, 0 for none, and the weight of their losses,
    cfg.MODEL.DETR.ONE_TO_MANY = CN({"QUERIES": 0, "REPEATS": 6, "WEIGHT": 1.0})
    # whether padding is hidden, and boxes relative to the image without it,
    cfg.MODEL.DETR.MASK_PADDING = True
    # height and width that batches are filled up to (0: what they need), and with what before
    # images are normalised (None: zeros after it),
    cfg.MODEL.DETR.SQUARE = 0
    cfg.MODEL.DETR.PAD_VALUE = None


def _add_detr_loss_keys(cfg: CN) -> None:
    # "DeformableDETR" is trained with "focal", or "quality_focal" towards the IoU, the weights of
    # the losses (those of boxes are the matching cost's too), the weight of the class in the cost,
    # and the focal loss and cost,
    cfg.MODEL.DETR.CLASS_LOSS = "focal"
    cfg.MODEL.DETR.CLASS_WEIGHT = 2.0
    cfg.MODEL.DETR.CLASS_COST = 2.0
    cfg.MODEL.DETR.L1_WEIGHT = 5.0
    cfg.MODEL.DETR.GIOU_WEIGHT = 2.0
    cfg.MODEL.DETR.FOCAL_ALPHA = 0.25
    cfg.MODEL.DETR.FOCAL_GAMMA = 2.0
    # whether only some classes of a batch have a classification loss (modeling/detr/federated.py):
    # how many, drawn by the images of DATASETS.TRAIN with them to a power,
    cfg.MODEL.DETR.FEDERATED = CN({"ENABLED": False, "CLASSES": 50, "POWER": 0.5})
    # detections per image, and soft suppression of those that overlap (modeling/detr/soft_nms.py).
    cfg.MODEL.DETR.MAX_DETECTIONS = 100
    cfg.MODEL.DETR.SOFT_NMS = CN({"ENABLED": False, "IOU": 0.8, "MIN_SCORE": 1e-3})
    cfg.MODEL.DETR.SOFT_NMS.BY_OFFSET = False
