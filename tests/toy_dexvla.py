"A world of one lamp for DexVLA on Qwen2-VL: the instruction names the way, the picture whether to hurry"
import torch

from vla_nb.core import Samples
from vla_nb.policies.dexvla_config import DexVLAQwenConfig
from vla_nb.policies.dexvla_qwen import DexVLAQwen
from vla_nb.train.config import TrainConfig

ways, dirs = ('left', 'right', 'up', 'down'), torch.tensor([[-1., 0], [1, 0], [0, 1], [0, -1]])
small = dict(width=64, depth=2, mlp=128, vision_width=48, vision_depth=2, min_pixels=256, head_width=64, combine_width=64, shift=0, swap_instruction=0., state_noise=0., brightness=0.)
configs = dict(full=DexVLAQwenConfig(**small, checkpointing=True), lora=DexVLAQwenConfig(**small, lora_rank=4, lora_alpha=8., frozen=('merger',)))


def lamps(n=16, seed=10):
    g = torch.Generator().manual_seed(seed)
    way,lamp = (torch.randint(0, k, (n,), generator=g) for k in (4, 2))
    image = torch.tensor([[220, 40, 40], [40, 200, 60]])[lamp][:,None,:,None,None].expand(n, 1, 3, 32, 32)*torch.rand(n, 1, 1, 32, 32, generator=g)
    action = dirs[way][:,None]*torch.tensor([.4, 1.])[lamp][:,None,None]*torch.linspace(.3, 1, 6)[:,None]
    said = [f'the light is {("red, slowly", "green, fast")[l]} {ways[w]}.' for w,l in zip(way, lamp)]
    return Samples(image.byte(), torch.rand(n, 2, generator=g), [f'go {ways[w]}' for w in way], action, torch.arange(6) >= torch.randint(2, 7, (n, 1), generator=g), torch.arange(n), said)


def dexvla(kind, data):
    of = lambda x: dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), min=x.amin(0).tolist(), max=x.amax(0).tolist())
    return DexVLAQwen.from_data(configs[kind], data.instruction+data.subtask, dict(state=of(data.state), action=of(data.action.flatten(0, 1))))


def pick(data, idx):
    return Samples(data.images[idx], data.state[idx], [data.instruction[i] for i in idx], data.action[idx], data.action_is_pad[idx], data.seed[idx], [data.subtask[i] for i in idx])


def run(out, kind, precision, accumulate):
    "Two steps of 8 samples: four micro-batches of two, in one process or in two"
    from vla_nb.train.loop import train
    data = lamps()
    policy = dexvla(kind, data)
    def make(start, rank, world):
        for k in range(start, 10**9):
            micro = k if world == 1 else 2*k+rank    # the same micro-batches, whoever takes them
            yield policy.prepare(pick(data, [(2*micro+i) % 16 for i in range(2)]))
    train(policy, make, TrainConfig(steps=2, batch_size=2, accumulate=accumulate, lr=1e-3, warmup=0, clip=.5, ema=.9*(kind == 'full'), log_every=1, cpu=True, precision=precision), out)
