"""The loop over test sets, its results, and the choice of the evaluator."""

import json
import logging
import math

import pytest
from detectron2.evaluation import DatasetEvaluator

from d2dense.errors import UserError
from d2dense.evaluation import build_evaluator, evaluate, flatten, write_results
from tests.evaluation.samples import Oracle, make_instances, register, unregister

NAMES = ("loop_coco", "loop_sem_seg")


@pytest.fixture(autouse=True)
def clean():
    yield
    for name in NAMES:
        unregister(name)


class Counter(DatasetEvaluator):
    """Counts images since the last reset."""

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        assert len(inputs) == len(outputs)
        self.images += len(inputs)

    def evaluate(self):
        return {"count": {"images": self.images, "IoU-road": 1.5, "IoU-sky": math.nan}}


def images(count):
    return [{"image_id": k} for k in range(count)]


@pytest.mark.parametrize("training", [True, False])
def test_model_evaluates_and_gets_its_mode_back(training):
    model = Oracle({k: {} for k in range(3)}).train(training)
    results = evaluate(model, {"a": [images(2), images(1)]}, {"a": Counter()})
    assert results["a"]["count"]["images"] == 3
    assert model.modes == [False, False]
    assert model.training is training
    with pytest.raises(KeyError):
        evaluate(model, {"a": [images(9)]}, {"a": Counter()})
    assert model.training is training


def test_several_test_sets_and_their_tables(caplog):
    model, counter = Oracle({k: {} for k in range(5)}), Counter()
    loaders = {"a": [images(2)], "b": [images(5)]}
    with caplog.at_level(logging.INFO, logger="d2dense"):
        results = evaluate(model, loaders, {"a": counter, "b": counter})
    assert [results[name]["count"]["images"] for name in "ab"] == [2, 5]
    assert "b, count:" in caplog.text
    assert "IoU-sky" in caplog.text
    assert "5 images" in caplog.text


def test_an_evaluator_may_return_nothing():
    class Silent(Counter):
        def evaluate(self):
            return None

    model = Oracle({0: {}})
    assert evaluate(model, {"a": [images(1)]}, {"a": Silent()}) == {"a": {}}


def test_flatten_names_the_test_set_only_among_several():
    metrics = {"bbox": {"AP": 1.0}, "segm": {"AP": 2.0, "AP50": 3.0}}
    assert flatten({"val": metrics}) == {"bbox/AP": 1.0, "segm/AP": 2.0, "segm/AP50": 3.0}
    assert flatten({"val": {"bbox": {"AP": 1.0}}, "test": {"bbox": {"AP": 4.0}}}) == {
        "val/bbox/AP": 1.0,
        "test/bbox/AP": 4.0,
    }
    assert flatten({}) == {}


def test_results_are_written_as_json(tmp_path):
    path = tmp_path / "new" / "folder" / "results.json"
    write_results({"val": {"bbox": {"AP": 12.5, "APs": math.nan}}}, path)
    read = json.loads(path.read_text())
    assert read["val"]["bbox"]["AP"] == 12.5
    assert math.isnan(read["val"]["bbox"]["APs"])


def test_factory_reports_mistakes(tmp_path):
    register("loop_coco", evaluator_type="cocoo")
    with pytest.raises(UserError, match="did you mean 'coco'"):
        build_evaluator("loop_coco")
    register("loop_coco")
    with pytest.raises(UserError, match="evaluator_type None"):
        build_evaluator("loop_coco")
    register("loop_sem_seg", evaluator_type="sem_seg", stuff_classes=["a"])
    with pytest.raises(UserError, match="tasks are for objects"):
        build_evaluator("loop_sem_seg", tasks=["bbox"])


def test_factory_passes_options_on(tmp_path):
    register("loop_coco", evaluator_type="coco", thing_classes=["a"])
    evaluator = build_evaluator(
        "loop_coco", output_dir=str(tmp_path / "out"), tasks=["bbox"], max_dets=7
    )
    assert (evaluator.tasks, evaluator.max_dets) == (("bbox",), 7)
    evaluator.process([{"image_id": 1}], [{"instances": make_instances((9, 9))}])
    assert build_evaluator("loop_coco").max_dets == 100
