"""torchvision's Mask R-CNN (He et al., arXiv 1703.06870) on a plain ViT, with ViTDet's heads."""

from timm.layers import LayerNorm2d
from timm.models import VisionTransformer
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from karat_scale.training.tasks.detection.backbone import LEVELS, ViTBackbone
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from karat_scale.training.tasks.detection.torchvision_parts import (
    Anchors,
    BoxPredictor,
    MaskPredictor,
    ProposalHead,
    RoIAlign,
    Transform,
)

_RATIOS = (0.5, 1.0, 2.0)


def build_detector(vit: VisionTransformer, recipe: DetectionRecipe) -> MaskRCNN:
    """Return the detector of a recipe, on `vit` from `build_vit`.

    In training it takes float images [3, h, w] in 0 .. 1 with sides of at most `image_size`. In evaluation it takes any
    size, and resizes so that the longer side fits. Both are padded to a square, so N never changes. Labels begin at 1;
    0 is background.
    """
    size, detector = recipe.model.image_size, recipe.detector
    channels, augment = detector.channels, recipe.augment
    strides = [patches * recipe.patch_size for patches in LEVELS.values()]
    maps = list(LEVELS)[:-1], strides[:-1]  # the last is only for proposals
    convolutions = [channels] * 4
    classes = recipe.model.num_classes + 1
    mask_rcnn = MaskRCNN(
        ViTBackbone(vit, recipe),
        rpn_anchor_generator=Anchors(detector.anchor_sizes, _RATIOS, strides),
        rpn_head=ProposalHead(channels, len(_RATIOS), conv_depth=2),
        rpn_batch_size_per_image=detector.anchors,
        rpn_pre_nms_top_n_train=detector.candidates_in_training or 2 * detector.proposals,
        rpn_pre_nms_top_n_test=detector.candidates or detector.proposals,
        rpn_post_nms_top_n_train=detector.proposals_in_training or detector.proposals,
        rpn_post_nms_top_n_test=detector.proposals,
        box_roi_pool=RoIAlign(*maps, output_size=7),
        box_head=FastRCNNConvFCHead((channels, 7, 7), convolutions, [detector.box_features], norm_layer=LayerNorm2d),
        box_predictor=BoxPredictor(detector.box_features, classes),
        box_score_thresh=detector.min_score,
        box_batch_size_per_image=detector.rois,
        box_detections_per_img=detector.detections,
        mask_roi_pool=RoIAlign(*maps, output_size=14),
        mask_head=MaskRCNNHeads(channels, convolutions, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskPredictor(channels, channels, classes),
    )
    mask_rcnn.transform = Transform(size, size, list(augment.mean), list(augment.std), size_divisible=size)
    return mask_rcnn
