"""What the analyses feed a model."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2dense import model_zoo
from d2dense.analyses.gradients import input_gradient
from d2dense.analyses.quality import Objects
from d2dense.analyses.subjects import (
    DETECTORS,
    SEGMENTERS,
    annotated_records,
    open_subject,
    records_of,
)
from d2dense.analyses.untouched import set_loss_mode
from d2dense.data import datasets, shapes
from d2dense.errors import UserError

CEDNET = "CEDNet/retinanet_cednet_tiny_shapes"
FPN = "HFGD/semantic_fpn_tiny_shapes"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five pictures of 96 x 96; the first has one object and one crowd, the second a crowd only,
    the third nothing.
    """
    root = tmp_path_factory.mktemp("shapes")
    shapes.generate(output_dir=root, split="val", count=5, size=96, seed=0)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    ids = [image["id"] for image in content["images"]]
    template = content["annotations"][0]
    kept = [a for a in content["annotations"] if a["image_id"] in ids[3:]]
    for number, (image, crowd) in enumerate([(0, 0), (0, 1), (1, 1)]):
        box = {"bbox": [10 + number, 20, 30, 40], "iscrowd": crowd, "segmentation": []}
        kept.append({**template, **box, "id": 10_000 + number, "image_id": ids[image]})
    path.write_text(json.dumps(content | {"annotations": kept}))
    slot = {"detectors": {"json": str(path), "images": str(root / "images" / "val")}}
    return datasets.register_custom(slot)["detectors"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model_zoo.get_model(CEDNET).state_dict()}, path)
    return path


def test_images_with_objects_only(dataset):
    records = annotated_records(dataset)
    assert len(records) == 3
    assert Objects.of(records[0]).boxes.tolist() == [[10, 20, 40, 60]]
    assert len(annotated_records(dataset, 2)) == 2
    assert len(annotated_records(dataset, 99)) == 3


def test_images_by_their_ids(dataset):
    ids = [str(record["image_id"]) for record in annotated_records(dataset)]
    chosen = records_of(dataset, [ids[2], ids[0]])
    assert [str(record["image_id"]) for record in chosen] == [ids[2], ids[0]]
    with pytest.raises(UserError, match="image 999 of the ranking is not among those with objects"):
        records_of(dataset, [ids[0], "999"])
    with pytest.raises(UserError, match="the ranking names no image"):
        records_of(dataset, [])


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_labelled_images_are_those_of_tests(dataset, weights, kind):
    path = model_zoo.get_config_file(CEDNET, kind)
    detector = open_subject(path, weights=weights, device="cpu", dataset=dataset)
    assert detector.name == "retinanet_cednet_tiny_shapes"
    assert not detector.model.training
    records = annotated_records(dataset, 2)
    tested = [batch[0] for batch in detector.test_images(records)]
    labelled = list(detector.labelled_images(records))
    assert tested[0]["image"].shape == (3, 160, 160)
    for a, b in zip(tested, labelled, strict=True):
        assert torch.equal(a["image"], b["image"])
    scaled = torch.tensor([[10.0, 20.0, 40.0, 60.0]]) * 160 / 96  # without the crowd
    torch.testing.assert_close(labelled[0]["instances"].gt_boxes.tensor, scaled)


def test_what_cannot_be_analysed(dataset, weights):
    yaml = model_zoo.get_config_file(CEDNET, "yaml")
    options = {"weights": weights, "device": "cpu"}
    with pytest.raises(UserError, match="reads its test set by SemanticMapper"):
        open_subject(yaml, dataset=dataset, overrides=["INPUT.MAPPER", "semantic"], **options)
    two = ["DATASETS.TEST", f"['{dataset}', '{dataset}']"]
    with pytest.raises(UserError, match="choose one with --dataset"):
        open_subject(yaml, overrides=two, **options)
    with pytest.raises(UserError, match="trained weights are needed"):
        open_subject(yaml, weights=None, device="cpu", dataset=dataset)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """SemanticFPN on two pictures of 64 x 64, which its config doubles."""
    root = tmp_path_factory.mktemp("labels")
    shapes.generate(output_dir=root, split="val", count=2, size=64, seed=0)
    folders = {"images": str(root / "images" / "val"), "labels": str(root / "semantic_val")}
    slot = {"segmenters": {**folders, "classes": list(shapes.SEMANTIC_CLASSES)}}
    name = datasets.register_custom(slot)["segmenters"]
    torch.save({"model": model_zoo.get_model(FPN).state_dict()}, root / "model.pth")
    options = {"weights": root / "model.pth", "device": "cpu", "dataset": name}
    return open_subject(FPN, kinds=(DETECTORS, SEGMENTERS), **options)


def test_labelled_images_of_segmenters_have_label_maps(segmenter):
    records = annotated_records(segmenter.dataset)
    for record, sample in zip(records, segmenter.labelled_images(records), strict=True):
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert sample["image"].shape == (3, 129, 129)
        assert np.array_equal(sample["sem_seg"][1::2, 1::2].numpy(), labels)


def test_predictions_are_of_the_images_own_size(segmenter):
    records = annotated_records(segmenter.dataset)
    found = [output["sem_seg"].shape for output in segmenter.predictions(records)]
    assert found == [(15, 64, 64)] * 2


def test_gradients_of_segmenters_are_those_of_their_loss(segmenter):
    (sample, _) = segmenter.labelled_images(annotated_records(segmenter.dataset))
    found = input_gradient(segmenter.model, sample)
    image = sample["image"].float().requires_grad_()
    model = copy.deepcopy(segmenter.model)
    set_loss_mode(model)
    loss = sum(model([{**sample, "image": image}]).values())
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(found.map, image.grad.abs().amax(dim=0), rtol=1e-3, atol=1e-8)


def test_mask2former_gets_masks(dataset, tmp_path):
    name = "CEDNet/mask2former_cednet_tiny_shapes"
    torch.save({"model": model_zoo.get_model(name).state_dict()}, tmp_path / "model.pth")
    options = {"weights": tmp_path / "model.pth", "device": "cpu", "dataset": dataset}
    subject = open_subject(name, **options)
    (sample,) = subject.labelled_images(annotated_records(dataset).select(np.array([2])))
    assert len(sample["instances"].gt_masks) == len(sample["instances"]) > 0
    assert input_gradient(subject.model, sample).map.max() > 0
