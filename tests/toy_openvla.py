"OpenVLA in miniature for the engines: steered eyes whose blocks are walked through from outside, LoRA, recomputed activations"
from dataclasses import replace

import torch

from toy_dexvla import lamps, pick
from vla_nb.policies.openvla import OpenVLA
from vla_nb.policies.openvla_config import OpenVLAConfig
from vla_nb.train.config import TrainConfig

small = OpenVLAConfig(horizon=6, image=16, patch=8, vision_width=16, vision_heads=2, vision_depth=3, width=32, depth=2, heads=2, mlp=48, head_width=32, film=True, checkpointing=True)
configs = dict(full=small, lora=replace(small, lora_rank=2, lora_merge=True, image_aug=True))


def run(out, kind, precision, accumulate):
    "Two steps of 8 samples: four micro-batches of two, in one process or in two"
    from vla_nb.train.loop import train
    data = lamps()
    of = lambda x: dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), min=x.amin(0).tolist(), max=x.amax(0).tolist(), q01=x.amin(0).tolist(), q99=x.amax(0).tolist())
    policy = OpenVLA.from_data(configs[kind], data.instruction+data.subtask, dict(state=of(data.state), action=of(data.action.flatten(0, 1))))
    def make(start, rank, world):
        for k in range(start, 10**9):
            micro = k if world == 1 else 2*k+rank    # the same micro-batches, whoever takes them
            yield policy.prepare(pick(data, [(2*micro+i) % 16 for i in range(2)]))
    train(policy, make, TrainConfig(steps=2, batch_size=2, accumulate=accumulate, lr=1e-3, warmup=0, clip=.5, ema=.9*(kind == 'full'), log_every=1, cpu=True, precision=precision), out)
