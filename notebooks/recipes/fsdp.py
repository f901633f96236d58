"""Fine-tune with FSDP2, parameters in shards: `torchrun --nproc-per-node 2 fsdp.py --data-dir IMAGES`."""
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from finetune import (
    ReplayableSampler,
    check_output,
    make_model,
    make_optimizer,
    make_schedule,
    open_images,
    parser,
    save_weights,
    seed_for,
    steps_per_epoch,
)
from timm.layers import convert_sync_batchnorm
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader


def shard(model, policy=None):
    """Shard each block, gathered when it runs, and what lies outside of the blocks; in place."""
    policy = policy or MixedPrecisionPolicy()
    for stage in model.stages:
        for block in stage.blocks:
            for module in block.modules():
                if isinstance(module, _BatchNorm):
                    fully_shard(module)  # as precise as its running statistics, or torch refuses to mix them
            fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


class Progress:
    """What a checkpoint holds: model, optimizer and the steps done."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return dict(model=model, optimizer=optimizer, step=self.step)

    def load_state_dict(self, state):
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
        self.step = state['step']


def checkpoints(args):
    """Complete checkpoints, oldest first: one that was cut short has no metadata, which are written last."""
    return sorted(path.parent for path in Path(args.output).glob('step-*/.metadata'))


def train(args, model, images, device):
    """Train, from the newest complete checkpoint with --resume."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    sampler = ReplayableSampler(images, args.seed, num_replicas=processes, rank=rank)
    steps = steps_per_epoch(args, images, processes)
    optimizer = make_optimizer(model, args)
    schedule = make_schedule(optimizer, args, args.epochs * steps)
    progress = Progress(model, optimizer)
    checkpoint = check_output(args, checkpoints(args))
    if checkpoint:
        dcp.load(dict(progress=progress), checkpoint_id=checkpoint)

    for epoch in range(progress.step // steps, args.epochs):
        sampler.set_epoch(epoch)
        sampler.start = progress.step % steps * args.batch_size
        for x, labels in DataLoader(images, args.batch_size, sampler=sampler, num_workers=args.workers):
            schedule.step_update(progress.step)
            # stochastic depth depends on the step, not on when the run was started
            torch.manual_seed(seed_for(args.seed, progress.step, rank))
            loss = F.cross_entropy(model(x.to(device)).float(), labels.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            if rank == 0 and progress.step % args.log_steps == 0:
                print(f'step {progress.step} of {args.epochs * steps}: loss {loss.item():.6f}', flush=True)
            if progress.step % args.save_steps == 0:
                dcp.save(dict(progress=progress), checkpoint_id=f'{args.output}/step-{progress.step:08d}')
                for old in checkpoints(args)[:-2] if rank == 0 else []:
                    shutil.rmtree(old)


def fine_tune(args, device):
    """Build the sharded model, train it and keep its weights in one file."""
    images, val = open_images(args)
    model = make_model(args, images, val)
    if device.type == 'cuda':
        model = convert_sync_batchnorm(model)  # torch has none for the CPU
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.bf16 else None
    model = shard(model.to(device), policy)
    train(args, model, images, device)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        save_weights(weights, args)


def main(argv=None):
    """Fine-tune within a group of processes."""
    recipe = parser(__doc__)
    args = recipe.parse_args(argv)
    if 'RANK' not in os.environ:
        recipe.error('there is no group of processes: start this with torchrun instead of python')
    device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if torch.cuda.is_available() else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
    try:
        fine_tune(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
