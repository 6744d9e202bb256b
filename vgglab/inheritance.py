"""What a resumed run takes over from the one it goes on from, and what it does otherwise."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any, Sequence

from vgglab.config import Config, check
from vgglab.errors import UserError

# What belongs to the run that is being started, not to the one it goes on from.
NOT_INHERITED = (
    "resume run_dir output_dir test_only start_epoch pretrained device world_size workers dist_url tensorboard amp "
    "channels_last fused tf32 cache_dataset fix_seed seeds eval_step_per_epoch timers trace apex apex_opt_level "
    "enable_horovod"
).split()


# Who gives the first has said something about the others too.
IMPLIED = {"fix_seed": ["seed"], "fast": ["amp_dtype"], "amp": ["amp_dtype"], "data_path": ["num_classes"]}


def inherit(config: Config, given: Sequence[str], earlier: dict[str, Any]) -> None:
    """Take over what nobody gave on this command line from the settings of the run that is resumed.

    Raises:
        UserError: a setting in there is none, or contradicts one that was given.
    """
    kept = {*given, *NOT_INHERITED, *(other for name in given for other in IMPLIED.get(name, ()))}
    for item in fields(Config):
        if item.name in earlier and item.name not in kept:
            setattr(config, item.name, checked(item, earlier[item.name]))
    check(config)


def checked(item: Field, value: Any) -> Any:
    """A setting that was read from a file, held to what its flag allows."""
    if value is None:
        return item.default
    try:
        parsed = item.metadata["parse"](str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"its {item.name} is damaged: {error}") from None
    if parsed not in item.metadata.get("choices", (parsed,)):
        raise UserError(f"its {item.name} is damaged: {value!r}")
    return parsed


# What decides the weights: a resumed run that differs here is another experiment from then on.
RECIPE = (
    "data_path batch_size world_size image_size dropout_rate lr optimizer momentum nesterov rmsprop_alpha "
    "rmsprop_eps weight_decay bn_weight_decay bias_weight_decay lr_schedule warmup end_lr lr_step_size lr_gamma "
    "lr_patience crops label_smoothing mixup cutmix ema amp_dtype tf32 channels_last seed training_step_per_epoch"
).split()


def changed_settings(content: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """``--lr 0.01, was 0.1`` for each part of the recipe that is not what the checkpoint was trained with."""
    before = content.get("config", {})
    return [
        f"--{name.replace('_', '-')} {config[name]}, was {before[name]}"
        for name in RECIPE
        if name in before and before[name] != config[name]
    ]
