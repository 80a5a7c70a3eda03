"""A plugin for the CPU harness (``--plugin exact``): slime in float32, which it has no flag for."""

import slime_cpu_hooks


def in_float32(module):
    own = module._set_default_megatron_args

    def defaults(args):
        args = own(args)
        args.bf16 = False
        return args

    module._set_default_megatron_args = defaults


slime_cpu_hooks.after("slime.backends.megatron_utils.arguments", in_float32)


def no_signal(args, samples):
    """For ``--custom-reward-post-process-path``: the rewards, and advantages of 0."""
    return [sample.reward for sample in samples], [0.0] * len(samples)
