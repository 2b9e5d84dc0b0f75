"""The loading example of the documentation runs as it stands, without this project."""

import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import torch

from d2dense import export
from tests.export.exportable import picture, tiny_model


def example():
    text = export.__doc__.split("With TorchScript::")[1]
    lines = []
    for line in text.splitlines()[1:]:
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines))


def test_example(tmp_path):
    result = export.export_model(
        tiny_model(mask=True),
        picture(96, 128),
        output_dir=tmp_path,
        classes=["one", "two", "three", "four", "five"],
        resize={"rule": "shortest_edge", "min_size": 96, "max_size": 160},
    )
    image = picture(192, 256).permute(1, 2, 0).numpy()
    cv2.imwrite(str(tmp_path / "picture.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    block = Path(export.__file__).with_name("fresh_run.py").read_text().split("def main")[0]
    script = tmp_path / "example.py"
    script.write_text(f"{block}\nsys.meta_path.insert(0, _Block())\n{example()}")
    command = [sys.executable, "-I", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    # the same picture, read and resized by Detectron2
    from detectron2.data.detection_utils import read_image
    from detectron2.data.transforms import ResizeShortestEdge

    image = read_image(tmp_path / "picture.jpg", format="BGR")
    resized = ResizeShortestEdge([96], 160, "choice").get_transform(image).apply_image(image)
    inputs = {"image": torch.from_numpy(resized.transpose(2, 0, 1).copy())}
    found = export.load(result.path)([{**inputs, "height": 192, "width": 256}])[0]["instances"]
    assert len(found) > 10
    lines = done.stdout.splitlines()
    assert abs(len(lines) - len(found)) <= 5  # torchvision resizes almost, not exactly, like PIL
    name, score, *box = lines[0].split()
    assert name in ("one", "two", "three", "four", "five")
    assert abs(float(score) - float(found.scores[0])) < 0.05
    assert torch.allclose(
        torch.tensor([float(x) for x in box]), found.pred_boxes.tensor[0], atol=5.0
    )
