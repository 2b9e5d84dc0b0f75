"""Run a saved model where nothing but what its format needs can be imported.

TorchScript and torch.export need torch and torchvision; ONNX needs onnxruntime alone.

Started by :mod:`d2dense.export.verification` as a script in a process of its own; it must not
import anything of this project.

usage: fresh_run.py MODEL IMAGES RESULTS THREADS
"""

import sys

BLOCKED = ("d2dense", "detectron2", "fvcore", "iopath", "cednet", "codetr", "fscascade", "hfgd")


class _Block:
    """An import hook that refuses the packages that the model must not need."""

    def __init__(self, names=BLOCKED):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked: an exported model must run without it")
        return None


def _with_torch(opened, takes_bytes):
    import torch

    def run(image):
        tensor = torch.from_numpy(image)
        with torch.no_grad():
            outputs = opened(tensor if takes_bytes else tensor.float())
        return [each.numpy() for each in outputs]

    return run


def _torchscript(path, threads):
    import torch
    import torchvision  # noqa: F401 (registers the operators nms and roi_align)

    torch.set_num_threads(threads)
    return _with_torch(torch.jit.load(path, map_location="cpu"), True)


def _torch_export(path, threads):
    import torch
    import torchvision  # noqa: F401 (registers the operators nms and roi_align)

    torch.set_num_threads(threads)
    return _with_torch(torch.export.load(path).module(), False)


def _onnx(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.astype("float32")})


OPENERS = {".ts": _torchscript, ".pt2": _torch_export, ".onnx": _onnx}


def main(model: str, images: str, results: str, threads: str) -> None:
    suffix = model[model.rindex(".") :]
    blocked = BLOCKED + (("torch", "torchvision") if suffix == ".onnx" else ())
    sys.meta_path.insert(0, _Block(blocked))
    import numpy

    run = OPENERS[suffix](model, int(threads))
    with numpy.load(images) as given:
        outputs = {
            f"{name}.{number}": value
            for name in given.files
            for number, value in enumerate(run(given[name]))
        }
    numpy.savez(results, **outputs)
    found = sorted(name for name in blocked if name in sys.modules)
    if found:
        raise SystemExit(f"the fresh process had {', '.join(found)} loaded")


if __name__ == "__main__":
    main(*sys.argv[1:])
