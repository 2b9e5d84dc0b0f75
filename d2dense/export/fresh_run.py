"""Run a saved model where nothing but torch and torchvision can be imported.

Started by :mod:`d2dense.export.verification` as a script in a process of its own; it must not
import anything of this project.

usage: fresh_run.py MODEL IMAGES RESULTS THREADS
"""

import sys

BLOCKED = ("d2dense", "detectron2", "fvcore", "iopath", "cednet", "codetr", "fscascade", "hfgd")


class _Block:
    """An import hook that refuses the packages that the model must not need."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked: an exported model must run without it")
        return None


def main(model: str, images: str, results: str, threads: str) -> None:
    sys.meta_path.insert(0, _Block())
    import torch
    import torchvision  # noqa: F401 (registers the operators nms and roi_align)

    torch.set_num_threads(int(threads))
    module = torch.jit.load(model, map_location="cpu")
    with torch.no_grad():
        outputs = [module(image) for image in torch.load(images, weights_only=True)]
    torch.save(outputs, results)
    found = sorted(name for name in BLOCKED if name in sys.modules)
    if found:
        raise SystemExit(f"the fresh process had {', '.join(found)} loaded")


if __name__ == "__main__":
    main(*sys.argv[1:])
