"""How a config's evaluation goes over an image, around an exported segmenter.

A file gives the scores of one pass over the image that it gets. Windows, several scales, filling up
and the way scores are resized are not inside: they belong to the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from d2dense.modeling import Segmenter, SemanticInference
from d2dense.modeling.segmenter import inference_of

__all__ = ["Protocol", "with_protocol"]


class Protocol(nn.Module):
    """An exported segmenter, seen as a :class:`~d2dense.modeling.Segmenter` evaluates.

    Args:
        model: an :class:`~d2dense.export.ExportedDetector` whose task is ``semantic``.
        inference: how evaluation goes over an image.
        fill: value of each channel, in [0, 255], for pixels that are filled up.
        device: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inference: SemanticInference,
        fill: Sequence[float],
        device: str | torch.device = "cpu",
    ):
        super().__init__()
        self.model = model
        self.inference = inference
        self.fill = torch.tensor(list(fill), device=device).view(-1, 1, 1)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Take and return what Detectron2's segmenters do in evaluation."""
        return [{"sem_seg": self._one(item)} for item in batched_inputs]

    def _one(self, item: dict[str, Any]) -> Tensor:
        image = item["image"].to(self.fill)
        size = int(item.get("height", image.shape[1])), int(item.get("width", image.shape[2]))
        # the file normalises: filling up and resizing before that is the same as after
        return self.inference(self._scores, image[None], size, self.fill)[0]

    def _scores(self, images: Tensor) -> Tensor:
        return torch.stack([self.model.run(image)["sem_seg"] for image in images])


def with_protocol(
    model: nn.Module, cfg: CfgNode | DictConfig, *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Return an exported segmenter behind the :class:`Protocol` of a config, another model as it
    is.
    """
    if model.metadata["task"] != "semantic":
        return model
    if isinstance(cfg, CfgNode):
        if Segmenter.__name__ != cfg.MODEL.META_ARCHITECTURE:
            return model
        inference, mean = inference_of(cfg), list(cfg.MODEL.PIXEL_MEAN)
    else:
        node = OmegaConf.select(cfg, "model.inference")
        if node is None:
            return model
        inference, mean = instantiate(node), list(cfg.model.pixel_mean)
    if inference.pad_value is not None:
        mean = [inference.pad_value] * len(mean)
    return Protocol(model, inference=inference, fill=mean, device=device)
