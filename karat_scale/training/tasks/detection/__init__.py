"""Mask R-CNN on a KArAt or softmax ViT: recipes, COCO data, training and mAP."""
