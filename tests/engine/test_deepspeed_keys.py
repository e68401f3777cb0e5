"""No key of a DeepSpeed file is passed over in silence."""

import inspect
import re

import pytest

from karat_scale.engine.deepspeed_config import REFUSED, accepted_keys, check_keys
from karat_scale.foundation.errors import RecipeError


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean gradient_clipping?"),
        ({"qwertz": 1}, "qwertz: unknown key; DeepSpeed has no such key"),
        (
            {"zero_optimization": {"reduce_bucket": 5}},
            "zero_optimization.reduce_bucket: unknown key; did you mean reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key; did you mean device?",
        ),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage = 'three'"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size = -1"),
        ({"zero_optimization": True}, "zero_optimization = True: should be an object"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint = True: checkpoints"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm = False: the norm"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 'not supported; use "cpu"'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs ZeRO stage 1"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow = False: steps on NaN"),
        ({"bf16": {"enable": True}}, "bf16.enable: unknown key; did you mean enabled?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean grad_accum_dtype?"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, "did you mean cpu_checkpointing?"),
        ({"flops_profiler": {"enable": True}}, "did you mean enabled?"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: the recipe's optim section makes the optimizer; remove it"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: train.precision sets the precision"),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale = -1: fp16.loss_scale must be >= 0"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown = 'yes': should be a valid boolean"),
        ({"prescale_gradients": "false"}, "prescale_gradients = 'false': should be a valid boolean"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor = 0: should be greater than 0"),
        ({"steps_per_print": "10"}, "steps_per_print = '10': should be a valid integer"),
        ({"communication_data_type": 3}, "communication_data_type = 3: should be a valid string"),
        ({"communication_data_type": "int3"}, "communication_data_type = 'int3': DeepSpeed cannot read it: ValueError"),
        ({"dump_state": False, "flops_profiler": {"enabled": "yes"}}, "flops_profiler = {'enabled': 'yes'}: DeepSpeed"),
        ({"timers": {"throughput": {"enabled": "often"}}}, "timers = "),
        ({"timers": 3}, "timers = 3: DeepSpeed cannot read it: TypeError"),
        ({"data_types": {"grad_accum_dtype": "int3"}}, "data_types.grad_accum_dtype = 'int3': should be"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile = True: train.compile = true"),
    ],
)
def test_what_is_wrong_is_one_line_that_begins_with_the_source(config, part: str) -> None:
    with pytest.raises(RecipeError, match=r"^own\.json: ") as caught:
        check_keys(config, "own.json")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_deepspeed_reads_passes() -> None:
    zero = {"stage": 3, "overlap_comm": True, "stage3_max_live_parameters": 10, "offload_param": {"device": "cpu"}}
    check_keys(
        {"zero_optimization": zero, "wall_clock_breakdown": True, "comms_logger": {"enabled": False}}, "own.json"
    )


def test_every_key_that_deepspeed_reads_at_the_top_is_accepted_or_refused() -> None:
    """A new release's key fails here, for a person to decide on."""
    from deepspeed.runtime import config

    patterns = (r"param_dict, ([A-Z]\w+)", r"param_dict\.get\(([A-Z]\w+)", r"([A-Z]\w+) in param_dict(?!\[)")
    found = re.findall("|".join(patterns), inspect.getsource(config))
    read = {getattr(config, name) for groups in found for name in groups if name}
    assert {"train_batch_size", "gradient_clipping", "zero_force_ds_cpu_optimizer", "data_types"} <= read
    assert read <= accepted_keys() | set(REFUSED)
