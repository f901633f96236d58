"""Fine-tune with Lightning: `python lightning_finetune.py --data-dir IMAGES --devices 1`."""
from pathlib import Path

import lightning
import torch
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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """Goes on in the middle of an epoch, by the two methods that Lightning looks for in order to resume there."""

    first = position = 0

    def __iter__(self):
        first, self.first = self.first, 0
        self.sampler.start = first * self.batch_size
        for self.position, batch in enumerate(super().__iter__(), first + 1):
            yield batch

    def state_dict(self):
        return dict(position=self.position % len(self))

    def load_state_dict(self, state):
        self.first = state['position']


def train_loader(args, images, trainer):
    """The images of one process, in an order that a resumed run goes on with."""
    sampler = ReplayableSampler(images, args.seed, num_replicas=trainer.world_size, rank=trainer.global_rank)
    return ResumableLoader(images, batch_size=args.batch_size, sampler=sampler, num_workers=args.workers)


class Images(lightning.LightningDataModule):
    def __init__(self, args, train, val):
        super().__init__()
        self.args, self.train, self.val = args, train, val

    def train_dataloader(self):
        return train_loader(self.args, self.train, self.trainer)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.args.batch_size, num_workers=self.args.workers) if self.val else []


class Classifier(lightning.LightningModule):
    def __init__(self, args, model):
        super().__init__()
        self.args, self.model = args, model

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model, self.args)
        steps = steps_per_epoch(self.args, self.trainer.datamodule.train, self.trainer.world_size)
        self.schedule = make_schedule(optimizer, self.args, self.args.epochs * steps)
        return optimizer

    def on_train_batch_start(self, batch, batch_idx):
        self.schedule.step_update(self.global_step)
        # stochastic depth depends on the step, not on when the run was started
        torch.manual_seed(seed_for(self.args.seed, self.global_step, self.global_rank))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log('loss', loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log('accuracy', right, prog_bar=True, batch_size=len(batch[1]), sync_dist=True)


def main(argv=None):
    """Train, from the newest checkpoint with --resume."""
    recipe = parser(__doc__)
    recipe.add_argument('--devices', default='auto', help='processes on this machine, one for each GPU')
    recipe.add_argument('--num-nodes', type=int, default=1, help='machines')
    args = recipe.parse_args(argv)
    train, val = open_images(args)
    checkpoint = check_output(args, sorted(Path(args.output).glob('step=*.ckpt')))

    classifier = Classifier(args, make_model(args, train, val))
    trainer = lightning.Trainer(
        devices=args.devices,
        num_nodes=args.num_nodes,
        max_epochs=args.epochs,
        precision='bf16-mixed' if args.bf16 else '32-true',
        gradient_clip_val=args.clip_grad,
        callbacks=[ModelCheckpoint(args.output, filename='{step:08d}', every_n_train_steps=args.save_steps)],
        logger=CSVLogger(args.output, name='logs'),
        log_every_n_steps=args.log_steps,
        use_distributed_sampler=False,  # the sampler divides the images itself
        sync_batchnorm=torch.cuda.is_available(),  # torch has none for the CPU
    )
    trainer.fit(classifier, datamodule=Images(args, train, val), ckpt_path=checkpoint)
    if trainer.is_global_zero:
        save_weights(classifier.model.state_dict(), args)


if __name__ == '__main__':
    main()
