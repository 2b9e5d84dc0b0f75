"""Classes that count in a batch of federated data."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import get_fed_loss_cls_weights

from d2dense.data import datasets
from d2dense.errors import UserError
from d2dense.modeling.detr import DETRCriterion, HungarianMatcher
from d2dense.modeling.detr.federated import FederatedClasses, federated_classes


def test_all_that_occur_count_and_others_fill_up():
    torch.manual_seed(0)
    choose = FederatedClasses(torch.ones(20), number=6)
    occur = torch.zeros(20, dtype=torch.bool)
    occur[[3, 7]] = True
    for _ in range(50):
        count = choose(occur)
        assert count[[3, 7]].all()
        assert int(count.sum()) == 6
    occur[:9] = True
    assert torch.equal(choose(occur), occur)


def test_draws_follow_the_weights():
    torch.manual_seed(0)
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    choose = FederatedClasses(weights, number=1)
    none = torch.zeros(5, dtype=torch.bool)
    shares = torch.stack([choose(none) for _ in range(8000)]).float().mean(dim=0)
    assert torch.allclose(shares, weights / 16, atol=0.02)


def test_frequencies_of_lvis():
    found = federated_classes(number=50, power=0.5)
    assert found.log_weights.shape == (1203,)
    assert found.log_weights.isfinite().all()


def test_frequencies_are_detectron2s():
    found = federated_classes(number=50, power=0.5)
    expected = get_fed_loss_cls_weights("lvis_v1_train", 0.5)
    torch.testing.assert_close(found.log_weights.exp(), expected)


@pytest.fixture
def own_data(tmp_path):
    """Three images of own data without numbers of images per class: 2, 1 and 0 images."""
    file = tmp_path / "own.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in range(3)]
    boxes = [(0, 5), (0, 5), (2, 5), (2, 9)]
    annotations = [
        {"id": i, "image_id": image, "category_id": c, "bbox": [1, 1, 4, 4], "area": 16}
        for i, (image, c) in enumerate(boxes)
    ]
    categories = [{"id": c, "name": str(c)} for c in (5, 9, 12)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    names = datasets.register_custom({"federated": {"json": str(file), "images": str(tmp_path)}})
    yield names["federated"], file
    DatasetCatalog.remove(names["federated"])
    MetadataCatalog.remove(names["federated"])


def test_images_of_own_data_are_counted(own_data):
    found = federated_classes(dataset=[own_data[0]], number=2, power=2.0)
    assert found.log_weights.exp().tolist() == pytest.approx([4, 1, 0])
    none = torch.zeros(3, dtype=torch.bool)
    assert all(found(none).tolist() == [True, True, False] for _ in range(20))


def test_own_numbers_of_images_come_first(own_data):
    name, file = own_data
    content = json.loads(file.read_text())
    for category, count in zip(content["categories"], (100, 9, 4)):
        category["image_count"] = count
    file.write_text(json.dumps(content))
    datasets.register_custom({"federated": {"json": str(file), "images": str(file.parent)}})
    assert federated_classes(dataset=name).log_weights.exp().tolist() == pytest.approx([10, 3, 2])


def test_a_trained_model_needs_no_training_data(caplog):
    datasets.register_custom({"gone": {"json": "gone.json", "images": "."}})
    found = federated_classes(dataset="custom_gone", num_classes=7)
    assert found.log_weights.tolist() == [0] * 7
    assert "gone.json" in caplog.text
    with pytest.raises(UserError, match=r"gone.json"):
        federated_classes(dataset="custom_gone")


def test_only_classes_that_count_have_a_loss():
    class Given(FederatedClasses):
        def forward(self, occur):
            self.occur = occur
            return occur | (torch.arange(5) == 4)

    given = Given(torch.ones(5))
    plain = DETRCriterion(matcher=HungarianMatcher(), num_classes=5)
    some = DETRCriterion(matcher=HungarianMatcher(), num_classes=5, federated=given)
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 7, 5)
    boxes = torch.rand(1, 2, 7, 4) * 0.5 + 0.2
    labels = torch.full((2, 7), 5)
    labels[0, 0], labels[1, 3] = 1, 2
    known = {
        "labels": labels,
        "targets": boxes[0],
        "box_weights": (labels < 5).float(),
        "sizes": torch.full((2, 1, 4), 100.0),
        "number": torch.tensor(2.0),
    }
    logits.requires_grad_()
    (whole,) = torch.autograd.grad(plain.known_losses(logits, boxes, **known)["loss_cls"], logits)
    (part,) = torch.autograd.grad(some.known_losses(logits, boxes, **known)["loss_cls"], logits)
    assert given.occur.tolist() == [False, True, True, False, False]
    assert not part[..., [0, 3]].any()
    assert torch.equal(part[..., [1, 2, 4]], whole[..., [1, 2, 4]])


def test_no_predictions_at_all():
    some = DETRCriterion(
        matcher=HungarianMatcher(), num_classes=5, federated=FederatedClasses(torch.ones(5))
    )
    found = some.known_losses(
        torch.zeros(1, 2, 0, 5),
        torch.zeros(1, 2, 0, 4),
        labels=torch.zeros(2, 0, dtype=torch.int64),
        targets=torch.zeros(2, 0, 4),
        box_weights=torch.zeros(2, 0),
        sizes=torch.full((2, 1, 4), 100.0),
        number=torch.tensor(1.0),
    )
    assert all(float(loss) == 0 for loss in found.values())
