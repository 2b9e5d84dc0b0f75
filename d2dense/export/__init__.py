"""Models as files that run without this project and without Detectron2.

``export(cfg, output_dir=...)`` (or ``tools/export_model.py``) writes two files:

``model.ts``
    TorchScript. ``forward(image)`` takes one image ``(C, H, W)``, uint8 or float32 in [0, 255],
    with the channel order and the size that ``model.json`` asks for, and returns a tuple of
    tensors. A detector gives boxes ``(N, 4)`` float32 (x0, y0, x1, y1 in pixels of the given
    image, best score first), scores ``(N,)``, classes ``(N,)`` int64 and, with a mask branch,
    masks ``(N, 28, 28)``: probabilities on a grid over each box; torchvision's
    ``models.detection.roi_heads.paste_masks_in_image(masks[:, None], boxes, (height, width))``
    stretches them over their boxes, above 0.5 is the object. A Mask2Former gives class scores,
    classes and mask logits ``(N, H, W)``, a semantic segmentor scores ``(K, H, W)``. Padding,
    normalisation and non-maximum suppression are inside; no device is written into the file, it
    runs where it is loaded (``map_location``). It evaluates as it is; a scripted file refuses
    ``eval()`` and ``train()``.

``model.pt2`` (``format="torch_export"``)
    A program of ``torch.export`` with the same outputs, for float32 images whose sides are at least
    33 pixels: ``torch.export.load("model.pt2").module()(image.float())``; ``import torchvision``
    before. It is recorded on the CPU, and the device is written into it:
    ``torch.export.passes.move_to_device_pass(program, "cuda")`` rewrites it, as :func:`load` does.

``model.onnx`` (``format="onnx"``, ``pip install '.[onnx]'``)
    The same program in the standard operators of opset 18; weights are inside. onnxruntime runs it
    without torch: ``InferenceSession("model.onnx").run(None, {"image": image})``, where ``image``
    is a float32 array ``(C, H, W)``.

``model.json``
    ``format``; ``task``; ``input`` with ``dtypes`` that the file takes, ``sides`` (least and
    greatest height and width, None: no limit), ``channels`` (``BGR``) and ``resize``
    (``shortest_edge``: the shorter side becomes ``min_size`` unless the longer one would exceed
    ``max_size``); ``outputs`` with name, shape, type and meaning; ``classes``; and the result of
    the check.

All compute in float32. The last two formats suppress boxes of all classes in one pass, moved apart
by class, as torchvision does for up to 1000 boxes; for more, torchvision goes class by class, and
boxes whose overlap is the threshold to the last digits may differ.

Every export is checked before the files appear: a fresh process that can import neither this
project nor Detectron2 runs the file on images of other sizes, and the results are compared with
those of the model.

The files need no code of ours. With TorchScript::

    import json

    import torch
    import torchvision  # also registers the operators nms and roi_align

    about = json.load(open("model.json"))
    model = torch.jit.load("model.ts", map_location="cpu")  # or "cuda"

    image = torchvision.io.read_image("picture.jpg", torchvision.io.ImageReadMode.RGB)
    height, width = image.shape[1:]
    rule = about["input"]["resize"]
    scale = min(rule["min_size"] / min(height, width), rule["max_size"] / max(height, width))
    size = [int(height * scale + 0.5), int(width * scale + 0.5)]
    resized = torchvision.transforms.functional.resize(image, size, antialias=True)
    if about["input"]["channels"] == "BGR":
        resized = resized.flip(0)

    with torch.no_grad():
        boxes, scores, classes = model(resized)[:3]
    boxes = boxes * torch.tensor([width / size[1], height / size[0]] * 2)
    for box, score, label in zip(boxes.tolist(), scores.tolist(), classes.tolist()):
        print(f"{about['classes'][label]:12} {score:.2f}", *(f"{x:.1f}" for x in box))

To evaluate a file like the model it came from: :func:`evaluate_exported`.
"""

from .adapters import Adapter, Output, adapt, register_adapter
from .artefact import ExportedDetector, evaluate_exported, load
from .devices import device_constants
from .formats import FORMATS, Format
from .pipeline import Exported, export, export_model
from .support import refusal
from .torchscript import METHODS, to_torchscript
from .verification import CheckError, ImageCheck, check_images, verify

__all__ = [
    "FORMATS",
    "METHODS",
    "Adapter",
    "CheckError",
    "Exported",
    "ExportedDetector",
    "Format",
    "ImageCheck",
    "Output",
    "adapt",
    "check_images",
    "device_constants",
    "evaluate_exported",
    "export",
    "export_model",
    "load",
    "refusal",
    "register_adapter",
    "to_torchscript",
    "verify",
]
