"""The check in a fresh process finds what is wrong with a file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2dense.export import CheckError, adapt, check_images, to_torchscript, verification, verify
from d2dense.export.adapters import BOXES, SCORES, Adapter
from tests.export.exportable import picture, run_here, tiny_model

FRESH_RUN = Path(verification.__file__).with_name("fresh_run.py")


class _Toy(Adapter):
    outputs = (BOXES, SCORES)

    def forward(self, image):
        mean = image.float().mean(dim=(0, 2))[:, None] * self.model.weight
        return mean, mean[:, 0]


@pytest.fixture
def toy():
    return _Toy(torch.nn.Linear(4, 1, bias=False)).eval()


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(verification, "_run_fresh", run_here)


def saved(module, path):
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def test_other_sizes_and_one_pale_image():
    images = check_images(picture(120, 160))
    sizes = {tuple(image.shape) for image in images}
    assert len(sizes) == len(images) == 3
    assert (3, 120, 160) not in sizes
    assert all(image.dtype == torch.uint8 for image in images)
    assert 1 < images[2].unique().numel() < 30


def test_no_side_is_larger_than_the_model_takes():
    sides = [max(each.shape[1:]) for each in check_images(torch.zeros(3, 90, 120), largest=125)]
    assert sides[0] == 125
    assert max(sides) == 125


def test_real_model_passes(tmp_path):
    model = tiny_model(mask=True)
    path = tmp_path / "model.ts"
    torch.jit.save(to_torchscript(model, picture(96, 128)), str(path))
    checks = verify(path, adapt(model).eval(), check_images(picture(96, 128)))
    assert len(checks) == 3
    assert max(check.error for check in checks) <= 1e-4
    assert checks[0].found > 0


@pytest.mark.usefixtures("in_process")
def test_relative_error_is_reported(tmp_path, toy):
    path = saved(toy, tmp_path / "toy.ts")
    images = check_images(picture(64, 64))
    toy.model.weight.data *= 1 + 1e-3
    with pytest.raises(CheckError, match=r"largest error 1\.0e-03 > 1e-04"):
        verify(path, toy, images)
    checks = verify(path, toy, images, tolerance=2e-3)
    assert max(check.error for check in checks) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.usefixtures("in_process")
def test_another_number_of_results(tmp_path, toy):
    class Fewer(_Toy):
        def forward(self, image):
            mean = image.float().mean(dim=(0, 2))[1:, None] * self.model.weight
            return mean, mean[:, 0]

    fewer = Fewer(toy.model)
    path = saved(fewer, tmp_path / "toy.ts")
    with pytest.raises(CheckError, match=r"boxes is .*\(46, 4\), but .*\(47, 4\) in eager mode"):
        verify(path, toy, check_images(picture(64, 64)))


class _Ranked(Adapter):
    """Two detections of scores ``weight``, at places that differ."""

    outputs = (BOXES, SCORES)

    def forward(self, image):
        scores = self.model.weight[0] + 0 * image.float().mean()
        return torch.stack([scores.new_zeros(4), scores.new_full((4,), 9.0)]), scores


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("gap", "fine"), [(1e-5, True), (1e-3, False)])
def test_scores_within_the_tolerance_have_no_order(tmp_path, gap, fine):
    ranked = _Ranked(torch.nn.Linear(2, 1, bias=False)).eval()
    ranked.model.weight.data = torch.tensor([[0.5, 0.5 - gap]])

    class Swapped(_Ranked):
        def forward(self, image):
            scores = self.model.weight[0] + 0 * image.float().mean()
            boxes = torch.stack([scores.new_full((4,), 9.0), scores.new_zeros(4)])
            return boxes, scores

    path = saved(Swapped(ranked.model), tmp_path / "toy.ts")
    if fine:
        assert max(check.error for check in verify(path, ranked, [picture(40, 40)])) <= 1e-4
    else:
        with pytest.raises(CheckError, match=r"largest error 9\.0e\+00"):
            verify(path, ranked, [picture(40, 40)])


class _Ordered(Adapter):
    """Two boxes, by the rank of two scores: the brightness of the upper corners."""

    outputs = (BOXES, SCORES)

    def forward(self, image):
        left, right = image[:, 0, 0].float().mean(), image[:, 0, -1].float().mean()
        order = (torch.stack([left, right]) * (1 + self.model.weight[0])).argsort()
        boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [9.0, 9.0, 20.0, 20.0]])
        return boxes[order], self.model.weight[1].detach()


@pytest.fixture
def ordered(tmp_path):
    """A model and its file, which ranks scores that differ by rounding otherwise."""
    adapter = _Ordered(torch.nn.Linear(2, 2, bias=False)).eval()
    adapter.model.weight.data = torch.tensor([[1e-7, 0.0], [0.9, 0.1]])
    path = saved(adapter, tmp_path / "ordered.ts")
    adapter.model.weight.data[0] = torch.tensor([0.0, 1e-7])
    return adapter, path


def tied(height, width):
    """An image whose upper corners have the same colour."""
    image = picture(height, width)
    image[:, 0, -1] = image[:, 0, 0]
    return image


@pytest.fixture
def runs(monkeypatch):
    """The images that the file was run on, call by call."""
    calls = []

    def run(path, images):
        calls.append(images)
        return run_here(path, images)

    monkeypatch.setattr(verification, "_run_fresh", run)
    return calls


def test_an_image_that_cannot_decide_is_moved(ordered, runs):
    adapter, path = ordered
    other = picture(50, 60)
    checks = verify(path, adapter, [tied(40, 60), other])
    assert [len(images) for images in runs] == [2, 1]
    assert runs[1][0].shape == (3, 40, 60)
    assert sorted((check.height, check.width) for check in checks) == [(40, 60), (50, 60)]
    assert max(check.error for check in checks) <= 1e-6


def test_if_no_image_decides_the_file_is_not_right(ordered, runs):
    adapter, path = ordered
    with pytest.raises(CheckError, match="largest error"):
        verify(path, adapter, [torch.full((3, 40, 60), 90, dtype=torch.uint8)])
    assert len(runs) == 8


def test_a_wrong_file_has_one_chance(ordered, runs):
    adapter, path = ordered
    image = picture(50, 60)
    image[:, 0, 0], image[:, 0, -1] = 200, 100
    adapter.model.weight.data[0] = torch.tensor([0.0, 9.0])
    with pytest.raises(CheckError, match="largest error"):
        verify(path, adapter, [image])
    assert len(runs) == 1


@pytest.mark.usefixtures("in_process")
def test_nan_is_a_difference(tmp_path, toy):
    path = saved(toy, tmp_path / "toy.ts")
    toy.model.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckError, match="largest error inf"):
        verify(path, toy, check_images(picture(64, 64)))


def test_a_file_that_does_not_run(tmp_path, toy):
    path = tmp_path / "toy.ts"
    path.write_bytes(b"not a model")
    with pytest.raises(CheckError, match="does not run in a fresh process"):
        verify(path, toy, check_images(picture(64, 64)))


def test_the_fresh_process_has_no_detectron2():
    code = (
        f"import sys; sys.path.insert(0, {str(FRESH_RUN.parent)!r}); import fresh_run\n"
        "sys.meta_path.insert(0, fresh_run._Block())\n"
        "for name in ('detectron2', 'd2dense', 'fscascade'):\n"
        "    try:\n        __import__(name)\n"
        "    except ImportError as error:\n        assert 'blocked' in str(error), error\n"
        "    else:\n        raise SystemExit(name + ' could be imported')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
