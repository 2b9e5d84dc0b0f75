"""Class counts: checked against the data, or taken from it, for both kinds of config."""

from __future__ import annotations

import pytest
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from torch import nn

from d2dense.config import CLASS_COUNT_KEYS, get_cfg, resolve_class_counts
from d2dense.data.classes import dataset_classes
from d2dense.data.datasets import register_custom
from d2dense.errors import UserError


@pytest.fixture
def names(tiny, tiny_semantic) -> dict[str, str]:
    things = {"json": tiny.json, "images": tiny.images}
    stuff = {
        "images": tiny_semantic.images,
        "labels": tiny_semantic.labels,
        "classes": ("a", "b", "c", "d"),
        "label_suffix": "_label.png",
    }
    return register_custom({"train": things, "val": things, "stuff": stuff})


def yaml_config(train, test=(), architecture="GeneralizedRCNN"):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.META_ARCHITECTURE = architecture
    return cfg


def lazy_config(train, test=None, **counts):
    heads = {key: L(nn.Linear)(num_classes=value) for key, value in counts.items()}
    return OmegaConf.create(
        {
            "model": {
                "backbone": {"num_classes": 1000},
                "unused": {"num_classes": None},
                **heads,
            },
            "dataloader": {
                "train": {"dataset": {"names": train}},
                "test": {"dataset": {"names": test or train}},
            },
            "train": {"class_count": "check"},
        },
        flags={"allow_objects": True},
    )


def test_names_come_from_the_data(names):
    assert dataset_classes(names["train"]) == ["apple", "banana", "cherry"]
    assert dataset_classes([names["train"], names["val"]]) == ["apple", "banana", "cherry"]
    assert dataset_classes(names["stuff"], "stuff") == ["a", "b", "c", "d"]
    assert len(dataset_classes("coco_2017_val")) == 80  # known without the files


def test_datasets_must_agree_and_be_of_the_right_kind(names):
    with pytest.raises(UserError, match=r"'custom_train' and 'coco_2017_val' have different"):
        dataset_classes([names["train"], "coco_2017_val"])
    with pytest.raises(UserError, match=r"'custom_stuff' has no objects"):
        dataset_classes(names["stuff"])
    with pytest.raises(UserError, match="not registered"):
        dataset_classes("custom_trian")


@pytest.mark.parametrize("wrong", ["json", "images"])
def test_a_missing_path_is_named_before_classes_are_compared(tiny, wrong):
    entries = {"json": tiny.json, "images": tiny.images} | {wrong: "/nope"}
    name = register_custom({"train": entries})["train"]
    with pytest.raises(UserError, match=r"datasets\.train\): /nope does not exist"):
        resolve_class_counts(lazy_config([name], ["coco_2017_val"], head="auto"))


def test_a_custom_training_set_alone_names_the_slot_that_is_missing(names):
    with pytest.raises(UserError, match=r"set datasets\.val\.json / DATASETS\.CUSTOM\.VAL\.JSON"):
        resolve_class_counts(lazy_config([names["train"]], ["coco_2017_val"], head="auto"))
    with pytest.raises(UserError, match=r"DATASETS\.CUSTOM\.VAL\.LABELS"):
        dataset_classes([names["stuff"], "cityscapes_fine_sem_seg_val"], "stuff")
    # the data of a built-in set may be absent
    cfg = resolve_class_counts(lazy_config(["coco_2017_train"], ["coco_2017_val"], head="auto"))
    assert cfg.model.head.num_classes == 80


@pytest.mark.parametrize(
    "architecture", ["GeneralizedRCNN", "RetinaNet", "BatchRetinaNet", "SemanticSegmentor"]
)
def test_yaml_mismatch_names_the_key_and_auto_is_resolved(names, architecture):
    semantic = architecture == "SemanticSegmentor"
    name, count = (names["stuff"], 4) if semantic else (names["train"], 3)
    cfg = yaml_config([name], [name], architecture)
    for key in CLASS_COUNT_KEYS[architecture]:
        with pytest.raises(UserError, match=rf"{key} = \d+, but dataset .* has {count}:"):
            resolve_class_counts(cfg)
        for value, setting in ((-1, "check"), (99, "auto"), (count, "check")):
            cfg.merge_from_list([key, value, "DATASETS.CLASS_COUNT", setting])
            cfg.freeze()
            node = resolve_class_counts(cfg)
            assert node.is_frozen()
            assert setting == cfg.DATASETS.CLASS_COUNT
            for part in key.split("."):
                node = node[part]
            assert node == count
            cfg.defrost()


def test_yaml_panoptic_models_count_both(names):
    cfg = yaml_config(["coco_2017_val_panoptic_separated"], (), "PanopticFPN")
    cfg.DATASETS.CLASS_COUNT = "auto"
    resolved = resolve_class_counts(cfg)
    assert resolved.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert resolved.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 54


def test_yaml_without_datasets_keeps_a_number_and_refuses_auto():
    cfg = yaml_config([])
    assert resolve_class_counts(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 80
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
    with pytest.raises(UserError, match=r"MODEL.ROI_HEADS.NUM_CLASSES is 'auto'"):
        resolve_class_counts(cfg)
    cfg.DATASETS.CLASS_COUNT = "maybe"
    with pytest.raises(UserError, match="expected 'check' or 'auto'"):
        resolve_class_counts(cfg)


def test_lazy_mismatch_names_the_key_and_auto_is_resolved(names):
    cfg = lazy_config(names["train"], head=80)
    with pytest.raises(UserError, match=r"model.head.num_classes = 80, .* 3: apple"):
        resolve_class_counts(cfg)
    cfg = lazy_config(names["train"], head="auto", other=3)
    resolved = resolve_class_counts(cfg)
    assert resolved.model.head.num_classes == resolved.model.other.num_classes == 3
    assert cfg.model.head.num_classes == "auto"  # the caller's config stays
    assert resolved.model.backbone.num_classes == 1000
    assert resolved.model.unused.num_classes is None
    cfg = lazy_config([names["train"]], [names["val"]], head=80)
    cfg.train.class_count = "auto"
    assert resolve_class_counts(cfg).model.head.num_classes == 3


def test_lazy_lists_and_interpolations_are_followed(names):
    cfg = lazy_config(names["train"], head="auto")
    cfg.model.stages = [{"num_classes": "auto"}, {"num_classes": "${model.head.num_classes}"}]
    resolved = resolve_class_counts(cfg)
    assert [stage.num_classes for stage in resolved.model.stages] == [3, 3]
    raw = OmegaConf.to_container(resolved.model.stages, resolve=False)
    assert raw[1]["num_classes"] == "${model.head.num_classes}"


def test_lazy_semantic_models_count_label_classes(names):
    cfg = lazy_config(names["stuff"], head="auto", sem_seg_head="auto")
    resolved = resolve_class_counts(cfg)
    assert resolved.model.head.num_classes == resolved.model.sem_seg_head.num_classes == 4
    both = lazy_config("coco_2017_val_panoptic_separated", head="auto", sem_seg_head="auto")
    resolved = resolve_class_counts(both)
    assert (resolved.model.head.num_classes, resolved.model.sem_seg_head.num_classes) == (80, 54)


def test_lazy_without_datasets(names):
    cfg = lazy_config(names["train"], head=7)
    del cfg["dataloader"]
    assert resolve_class_counts(cfg).model.head.num_classes == 7
    cfg.model.head.num_classes = "auto"
    with pytest.raises(UserError, match=r"model.head.num_classes is 'auto'"):
        resolve_class_counts(cfg)
