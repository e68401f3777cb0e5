import pytest

from karat_scale.training.tasks.detection.backbone import build_detector, build_schedule, build_vit, detector_groups


def test_rates_fall_block_by_block_below_the_pyramid_as_in_vitdet(small) -> None:
    recipe = small(optim={"layer_decay": 0.5, "weight_decay": 0.1})
    model = build_detector(build_vit(recipe), recipe)
    groups = detector_groups(model, recipe.optim)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    vit = model.backbone.vit
    scale = {
        vit.patch_embed.proj.weight: 0.5**3,
        vit.pos_embed: 0.5**3,
        vit.blocks[0].mlp.fc1.weight: 0.5**2,
        vit.blocks[1].attn.operator.cos_coef: 0.5,
        model.backbone.pyramid.levels[0][1].weight: 1.0,
        model.roi_heads.mask_predictor.mask_fcn_logits.weight: 1.0,
    }
    for parameter, expected in scale.items():
        assert of[id(parameter)]["lr_scale"] == expected
    without = (vit.pos_embed, vit.blocks[0].norm1.weight, model.rpn.head.cls_logits.bias)
    assert all(of[id(parameter)]["weight_decay"] == 0.0 for parameter in without)
    assert of[id(model.rpn.head.cls_logits.weight)]["weight_decay"] == 0.1


def test_the_rate_decays_after_each_epoch(small) -> None:
    recipe = small(
        optim={"lr": 1e-3},
        schedule={"warmup_steps": 0, "drops": [], "epoch_decay": 0.5},
        train={"epochs": 3, "global_batch": 8},
    )
    schedule = build_schedule(recipe, steps_per_epoch=6)
    assert [schedule.lr(step) for step in (0, 5, 6, 17)] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])


def test_the_rate_warms_up_and_drops_twice(small) -> None:
    recipe = small(
        optim={"lr": 1e-3, "lr_batch": 16},
        schedule={"warmup_steps": 10, "warmup_factor": 0.1, "drops": [0.5, 0.75]},
        train={"epochs": 10, "global_batch": 8},
    )
    schedule = build_schedule(recipe, steps_per_epoch=6)
    assert schedule.peak_lr == 5e-4
    assert [schedule.lr(step) for step in (0, 5, 10, 29, 30, 44, 45, 59)] == pytest.approx(
        [5e-5, 2.75e-4, 5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6]
    )
