"""HFGD's head: context-augmented encoder, upsampling, guidance by high-level features, losses.

Letters: N images, K classes, H and W of the image, C width of the decoder (256).
"""

# No postponed annotations here: TorchScript reads those of unused methods as objects.
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from d2dense.errors import UserError, nearest
from d2dense.layers import number_of_processes, sum_over_processes

from .car_losses import CARLosses
from .encoders import build_encoder
from .guided import HFGM, ClassKernels
from .layers import HeadNorm, at_least_float32, resize
from .upsampling import FeaturePyramid

__all__ = ["LOSS_NORMALIZERS", "UPSAMPLERS", "HFGDHead"]

UPSAMPLERS = ("none", "sfpn", "usfpn")
LOSS_NORMALIZERS = ("all", "valid")


@SEM_SEG_HEADS_REGISTRY.register()
class HFGDHead(nn.Module):
    """Scores from the coarsest map alone (coarse, for training) and from an upsampled map that is
    taught to fit the coarse path's classifier (fine).

    With everything on, the fine loss trains the upsampling and the HFGM only, all other losses
    train the backbone, the encoder and the classifier only. Without HFGM there is one path, one
    classifier and one cross entropy; class-aware losses stay where the encoder has their features.

    Args:
        input_shape: of the backbone's maps, by name.
        in_features: maps at strides 4, 8, 16 and 32; the last one alone without upsampling.
        size_feature: a map of the image's size, from which the head knows that size in tests.
            Where the backbone has none, the image is taken to be as large as its finest map times
            the stride.
        num_classes: K.
        channels: C, which is also the width of the encoder's result.
        encoder: ``identity``, ``aspp``, ``ocr``, ``self_attention`` or ``car``, the paper's CAE.
        encoder_channels, key_channels: inside the encoder.
        lead_convs, lead_kernel: leading convolutions of ``car`` and their size.
        upsampler: ``none``, ``sfpn`` (1x1 laterals, output stride 4) or ``usfpn`` (3x3).
        out_stride: of the fine map: 4, 2 or 1.
        hfgm: whether the fine path is guided.
        axial_attention, aa_heads, aa_residual: see :class:`~hfgd.guided.HFGM`.
        stop_grad_features, stop_grad_kernels: whether the fine loss is kept from the backbone and
            the encoder, and from the classifier.
        car: the class-aware losses; None for all of them with their usual settings.
        norm, norm_eps, norm_momentum: see :class:`~hfgd.layers.HeadNorm`.
        loss_normalizer: cross entropies are divided by the number of ``all`` pixels of the batch,
            or of the ``valid`` ones.
        fine_weight, coarse_weight, auxiliary_weight: factors of the cross entropies; the last one
            is of ``ocr``'s own classifier.
        ignore_value: label that counts in no cross entropy.

    Raises:
        UserError: an unknown name, a map that the backbone does not have, or switches that do not
            go together.
    """

    exchanges_in_forward = True  # class centres and counts of pixels, over all processes

    @configurable
    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        size_feature: str = "res0",
        num_classes: int,
        channels: int = 256,
        encoder: str = "car",
        encoder_channels: int = 512,
        key_channels: int = 64,
        lead_convs: int = 2,
        lead_kernel: int = 1,
        upsampler: str = "usfpn",
        out_stride: int = 4,
        hfgm: bool = True,
        axial_attention: bool = True,
        aa_heads: int = 4,
        aa_residual: bool = True,
        stop_grad_features: bool = True,
        stop_grad_kernels: bool = True,
        car: CARLosses | None = None,
        norm: str = "SyncBN",
        norm_eps: float = 1e-3,
        norm_momentum: float = 3e-4,
        loss_normalizer: str = "all",
        fine_weight: float = 1.0,
        coarse_weight: float = 1.0,
        auxiliary_weight: float = 0.4,
        ignore_value: int = 255,
    ):
        super().__init__()
        _check_names(upsampler, loss_normalizer, hfgm=hfgm, out_stride=out_stride)
        _check_maps(input_shape, in_features, upsampler)
        self.in_features = list(in_features)
        self.size_feature = size_feature if size_feature in input_shape else None
        self.stride = input_shape[self.in_features[0]].stride
        self.num_classes = num_classes
        self.stop_grad_features = hfgm and stop_grad_features
        self.stop_grad_kernels = hfgm and stop_grad_kernels
        self.loss_normalizer = loss_normalizer
        self.fine_weight, self.coarse_weight = fine_weight, coarse_weight
        self.auxiliary_weight = auxiliary_weight
        self.ignore_value = ignore_value

        head_norm = HeadNorm(name=norm, eps=norm_eps, momentum=norm_momentum)
        *finer, coarsest = (input_shape[name] for name in self.in_features)
        self.encoder = build_encoder(
            encoder,
            in_channels=coarsest.channels,
            out_channels=channels,
            channels=encoder_channels,
            key_channels=key_channels,
            lead_convs=lead_convs,
            lead_kernel=lead_kernel,
            stride=coarsest.stride,
            num_classes=num_classes,
            norm=head_norm,
        )
        self.classifier = ClassKernels(channels, num_classes)
        self.upsampler = None
        if upsampler != "none":
            self.upsampler = FeaturePyramid(
                in_channels=[shape.channels for shape in finer],
                channels=channels,
                lateral_kernel=3 if upsampler == "usfpn" else 1,
                out_stride=out_stride,
                norm=head_norm,
            )
        self.hfgm = None
        if hfgm:
            self.hfgm = HFGM(
                channels=channels,
                axial_attention=axial_attention,
                heads=aa_heads,
                residual=aa_residual,
                norm=head_norm,
            )
        self.car = CARLosses() if car is None else car
        if encoder == "car" and num_classes < 2 and (self.car.c2c or self.car.c2p):
            raise UserError(
                "CAR compares classes, but there is one (MODEL.SEM_SEG_HEAD.NUM_CLASSES / "
                "num_classes); switch MODEL.HFGD.CAR.C2C and C2P / car.c2c and car.c2p off"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        general, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.HFGD
        return {
            "input_shape": input_shape,
            "in_features": list(general.IN_FEATURES),
            "num_classes": general.NUM_CLASSES,
            "channels": general.CONVS_DIM,
            "encoder": node.CAE.NAME,
            "encoder_channels": node.CAE.CHANNELS,
            "key_channels": node.CAE.KEY_CHANNELS,
            "lead_convs": node.CAE.LEAD_CONVS,
            "lead_kernel": node.CAE.LEAD_KERNEL,
            "upsampler": node.UPSAMPLER.NAME,
            "out_stride": node.UPSAMPLER.OUT_STRIDE,
            "hfgm": node.HFGM.ENABLED,
            "axial_attention": node.HFGM.AXIAL_ATTENTION,
            "aa_heads": node.HFGM.AA_HEADS,
            "aa_residual": node.HFGM.AA_RESIDUAL,
            "stop_grad_features": node.HFGM.STOP_GRAD_FEATURES,
            "stop_grad_kernels": node.HFGM.STOP_GRAD_KERNELS,
            "car": CARLosses(**{key.lower(): value for key, value in node.CAR.items()}),
            "norm": general.NORM,
            "norm_eps": node.NORM_EPS,
            "norm_momentum": node.NORM_MOMENTUM,
            "loss_normalizer": node.LOSS_NORMALIZER,
            "fine_weight": general.LOSS_WEIGHT,
            "coarse_weight": node.COARSE_WEIGHT,
            "auxiliary_weight": node.AUXILIARY_WEIGHT,
            "ignore_value": general.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Detectron2's interface of a segmentation head.

        Args:
            features: the backbone's maps.
            targets: labels ``(N, H, W)``, in training.

        Returns:
            in training None and the losses, else scores ``(N, K, H, W)`` and no losses.
        """
        if self.training:
            assert targets is not None, "training needs the labels of every pixel"
            return None, self.losses(features, targets)
        size = self._image_size(features)
        context = self.encoder(features[self.in_features[-1]])
        no_losses: dict[str, Tensor] = {}
        scores = at_least_float32(self._fine_scores(features, context, size))
        return resize(scores, size[0], size[1]), no_losses

    @torch.jit.unused
    def losses(self, features: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``loss_fine``; with HFGM ``loss_coarse``; those of CAR, and ``loss_auxiliary``,
        where the encoder has them. Arguments as in :meth:`forward`.
        """
        size = (targets.shape[1], targets.shape[2])
        context, extra = self.encoder.encode(features[self.in_features[-1]])
        scores = {"loss_fine": (self.fine_weight, self._fine_scores(features, context, size))}
        if self.hfgm is not None:
            scores["loss_coarse"] = self.coarse_weight, self.classifier(context)
        if "auxiliary_scores" in extra:
            scores["loss_auxiliary"] = self.auxiliary_weight, extra["auxiliary_scores"]
        share = self._loss_share(targets)
        losses = {
            name: weight * self._cross_entropy(each, targets) * share
            for name, (weight, each) in scores.items()
        }
        if "car_features" in extra:
            losses |= self.car(extra["car_features"], targets, self.num_classes, self.ignore_value)
        return losses

    def coarse_scores(self, features: dict[str, Tensor]) -> Tensor:
        """Return scores ``(N, K, h, w)`` of the coarsest map, for analyses."""
        return self.classifier(self.encoder(features[self.in_features[-1]]))

    def fine_scores(self, features: dict[str, Tensor]) -> Tensor:
        """Return the scores ``(N, K, h, w)`` that inference enlarges to (H, W)."""
        context = self.encoder(features[self.in_features[-1]])
        return self._fine_scores(features, context, self._image_size(features))

    def _fine_scores(
        self, features: dict[str, Tensor], context: Tensor, size: tuple[int, int]
    ) -> Tensor:
        if self.upsampler is None:
            return self.classifier(context)
        maps: list[Tensor] = []
        for name in self.in_features[:-1]:
            maps.append(self._constant(features[name]))
        upsampled = self.upsampler(maps, self._constant(context), size)
        if self.hfgm is not None:
            upsampled = self.hfgm(upsampled)
        return self.classifier(upsampled, self.stop_grad_kernels)

    def _constant(self, x: Tensor) -> Tensor:
        return x.detach() if self.stop_grad_features else x

    def _image_size(self, features: dict[str, Tensor]) -> tuple[int, int]:
        name = self.size_feature
        if name is not None:
            return features[name].shape[2], features[name].shape[3]
        finest = features[self.in_features[0]]
        return finest.shape[2] * self.stride, finest.shape[3] * self.stride

    def _cross_entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over this process's pixels, at the labels' size."""
        # class by class, as log_softmax reads it: enlarged channels last, it would be copied
        scores = at_least_float32(scores).contiguous()
        enlarged = resize(scores, *targets.shape[1:])
        return F.cross_entropy(
            enlarged, targets.long(), ignore_index=self.ignore_value, reduction="sum"
        )

    def _loss_share(self, targets: Tensor) -> Tensor:
        """Return what a pixel's cross entropy counts: one over the pixels of all processes, times
        their number, since their gradients are averaged.
        """
        if self.loss_normalizer == "valid":
            count = (targets != self.ignore_value).sum().float()
        else:
            count = torch.full((), float(targets.numel()), device=targets.device)
        return number_of_processes() / sum_over_processes(count).clamp(min=1)


def _check_names(upsampler: str, loss_normalizer: str, *, hfgm: bool, out_stride: int) -> None:
    for key, value, known in (
        ("MODEL.HFGD.UPSAMPLER.NAME / upsampler", upsampler, UPSAMPLERS),
        ("MODEL.HFGD.LOSS_NORMALIZER / loss_normalizer", loss_normalizer, LOSS_NORMALIZERS),
    ):
        if value not in known:
            raise UserError(
                f"{key} is {value!r}, expected one of {', '.join(known)}{nearest(value, known)}"
            )
    if hfgm and upsampler == "none":
        raise UserError(
            "HFGM guides an upsampled map, and there is none: set MODEL.HFGD.UPSAMPLER.NAME / "
            "upsampler to sfpn or usfpn, or switch MODEL.HFGD.HFGM.ENABLED / hfgm off"
        )
    if upsampler == "sfpn" and out_stride != 4:
        raise UserError(
            f"sfpn ends at output stride 4, not {out_stride}; use usfpn "
            "(MODEL.HFGD.UPSAMPLER / upsampler, out_stride)"
        )


def _check_maps(
    input_shape: Mapping[str, ShapeSpec], in_features: Sequence[str], upsampler: str
) -> None:
    for name in in_features:
        if name not in input_shape:
            raise UserError(
                f"HFGDHead takes the map {name!r}, but the backbone has {', '.join(input_shape)}"
                f"{nearest(name, input_shape)}; change MODEL.SEM_SEG_HEAD.IN_FEATURES / in_features"
            )
    if len(in_features) != 4 and not (upsampler == "none" and in_features):
        raise UserError(
            f"HFGDHead takes maps at strides 4, 8, 16 and 32, found {', '.join(in_features)} "
            "(MODEL.SEM_SEG_HEAD.IN_FEATURES / in_features)"
        )
    finest = input_shape[in_features[0]].stride
    if upsampler != "none" and finest != 4:  # coarser ones may be dilated
        raise UserError(
            f"HFGDHead takes maps from stride 4 on, but {in_features[0]!r} has stride {finest} "
            "(MODEL.SEM_SEG_HEAD.IN_FEATURES / in_features)"
        )
